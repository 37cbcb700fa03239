"""Examples -> one batch of tensors: padded, packed into padded rows, or without padding in a single row.

Each batch also says where its supervised tokens are predicted, `loss_positions` (tokens,) int64: found here,
on the CPU, so that no step of training waits for the device to count them; and which of its sequences each
token belongs to, `sequence_ids` (batch, seq) int64, with -1 for padding.

An example is one sequence, `input_ids` (tokens,) and `labels` (tokens,), or several in a row, and then
`seq_lengths` holds the tokens of each. The first token of a sequence is never a target. If examples have
`origins`, (sequences, 2) or a list of pairs, file and line of each sequence, the batch has those of all its
sequences, (-1, -1) where an example has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dft.labels import IGNORE_INDEX, loss_positions

Example = Mapping[str, Any]


@dataclass(frozen=True)
class PaddedCollator:
    """Pads on the right to the longest example of the batch.

    `pad_token_id` may be any id of the vocabulary: padding is neither attended to nor supervised.
    """

    pad_token_id: int
    batching: ClassVar[str] = "padded on the right"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Examples of one sequence -> input_ids, labels, attention_mask, (batch, seq) int64.

        Raises:
            ValueError: an example of several sequences; an attention mask does not keep them apart.
        """
        for example in examples:
            if len(sequence_lengths(example)) > 1:
                raise ValueError(
                    f"an example holds {len(example['seq_lengths'])} sequences, which padding would join; "
                    "use PackedCollator or FlatCollator"
                )
        ids, labels = _padded(examples, self.pad_token_id)
        ones = [torch.ones(len(example["input_ids"]), dtype=torch.int64) for example in examples]
        mask = pad_sequence(ones, batch_first=True)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return completed(batch, examples, ids.shape[1])


@dataclass(frozen=True)
class PackedCollator:
    """Pads rows of several sequences on the right, and keeps the sequences apart by their positions.

    There is no attention mask, because transformers derives the boundaries of sequences from restarting
    positions only where none is given. Padding is one more sequence, which no other attends to.
    """

    pad_token_id: int
    batching: ClassVar[str] = "packed rows"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor | int]:
        """Examples -> input_ids, labels, position_ids, (batch, seq) int64; num_tokens, those not padding."""
        ids, labels = _padded(examples, self.pad_token_id)
        width = ids.shape[1]
        positions = []
        for example in examples:
            lengths = sequence_lengths(example)
            positions.append(_positions([*lengths, width - sum(lengths)]))
        position_ids = torch.stack(positions)  # (batch, seq)
        labels[position_ids == 0] = IGNORE_INDEX
        batch = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": position_ids,
            "num_tokens": sum(len(example["input_ids"]) for example in examples),
        }
        return completed(batch, examples, width)


@dataclass(frozen=True)
class FlatCollator:
    """Puts all sequences of a batch end to end in one row, for the kernels of flash attention.

    Gives what transformers' `DataCollatorWithFlattening` does with `return_flash_attn_kwargs`, and knows
    examples that hold several sequences.
    """

    batching: ClassVar[str] = "padding-free"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor | int]:
        """Examples -> one row of all their tokens, and where its sequences begin.

        Returns:
            input_ids, labels, position_ids: (1, tokens) int64. cu_seq_lens_q, cu_seq_lens_k:
            (sequences + 1,) int32, the tokens before each sequence and those of all. max_length_q,
            max_length_k: tokens of the longest sequence.
        """
        lengths = [length for example in examples for length in sequence_lengths(example)]
        position_ids = _positions(lengths)
        labels = torch.cat([_int64(example["labels"]) for example in examples])
        labels[position_ids == 0] = IGNORE_INDEX
        bounds = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        batch = {
            "input_ids": torch.cat([_int64(example["input_ids"]) for example in examples])[None],
            "labels": labels[None],
            "position_ids": position_ids[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds.clone(),
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        return completed(batch, examples, None)


def completed(batch: dict[str, Any], examples: Sequence[Example], width: int | None) -> dict[str, Any]:
    """A batch with what loss and metrics want to know of it.

    Args:
        width: to which each example is padded; None where they stand end to end in one row.
    """
    numbers: list[int] = []  # per stretch of tokens: of which sequence
    lengths: list[int] = []
    sequences = 0
    for example in examples:
        within = sequence_lengths(example)
        padding = 0 if width is None else width - sum(within)
        numbers += [*range(sequences, sequences + len(within)), -1]
        lengths += [*within, padding]
        sequences += len(within)
    ids = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths))
    batch |= {
        "loss_positions": loss_positions(batch["labels"]),
        "sequence_ids": ids.view_as(batch["labels"]),
    }
    if any("origins" in example for example in examples):
        batch["origins"] = torch.cat([_origins(example) for example in examples])
    return batch


def _origins(example: Example) -> Tensor:
    """(sequences, 2) int64."""
    count = len(sequence_lengths(example))
    if "origins" not in example:
        return torch.full((count, 2), -1)
    given = np.array(example["origins"])
    if given.shape != (count, 2) or given.dtype.kind not in "iu":
        raise ValueError(
            f"origins {example['origins']!r}: must be {count} pair(s) of numbers, file and line of each "
            "sequence; give a column of another meaning another name"
        )
    return _int64(given)


def sequence_lengths(example: Example) -> list[int]:
    """Tokens of each sequence of an example, in order.

    Raises:
        ValueError: they do not add up to the tokens of the example.
    """
    total = len(example["input_ids"])
    lengths = example.get("seq_lengths")
    if lengths is None:
        return [total]
    lengths = [int(length) for length in lengths]
    if sum(lengths) != total or min(lengths, default=0) < 1:
        raise ValueError(f"seq_lengths {lengths} must be positive and add up to the example's {total} tokens")
    return lengths


def _padded(examples: Sequence[Example], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and labels, (batch, seq) int64."""
    ids = [_int64(example["input_ids"]) for example in examples]
    labels = [_int64(example["labels"]) for example in examples]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    )


def _positions(lengths: Sequence[int]) -> Tensor:
    """(sum of lengths,) int64: 0, 1, ... anew for each sequence."""
    return torch.cat([torch.arange(length) for length in lengths])


def _int64(values: Any) -> Tensor:
    # A copy: the arrays of a mapped file are read-only, which tensors cannot be.
    return torch.from_numpy(np.array(values, dtype=np.int64))
