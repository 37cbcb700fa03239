"""Objectives whose weight depends on the whole distribution of the model at a token."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dft.loss.objectives.base import Objective, TokenRows


@dataclass(frozen=True)
class Eaft(Objective):
    """Entropy-Adaptive Fine-Tuning (arXiv 2601.02151): w = entropy of the top 20 tokens / ln 20.

    The 20 probabilities are first normalized to sum to 1, so w is in [0, 1]. Suited to learning new data with
    little forgetting: tokens that contradict a confident model get a small weight.
    """

    name: ClassVar[str] = "eaft"
    largest: ClassVar[int] = 20

    def weight(self, rows: TokenRows) -> Tensor:
        assert rows.top_logits is not None
        log_p = torch.log_softmax(rows.top_logits, -1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        return entropy / math.log(self.largest)

    def formula(self) -> str:
        return "entropy of the top 20 tokens / ln 20"
