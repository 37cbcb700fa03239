"""Examples -> one padded batch of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dft.constants import IGNORE_INDEX


@dataclass(frozen=True)
class PaddedCollator:
    """Pads on the right to the longest example of the batch.

    `pad_token_id` may be any id of the vocabulary: padding is neither attended to nor supervised.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Examples of `input_ids` and `labels` -> input_ids, labels, attention_mask, (batch, seq) int64."""
        ids = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in examples]
        labels = [torch.as_tensor(example["labels"], dtype=torch.int64) for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        }
