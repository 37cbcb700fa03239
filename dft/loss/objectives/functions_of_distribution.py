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


@dataclass(frozen=True)
class Deft(Objective):
    """Dynamic Entropy Fine-Tuning (arXiv 2602.11424): w = p^c, c the sum of the squares of all probabilities.

    c is the probability that two samples of the distribution are equal (exp of minus the Renyi-2 entropy):
    where the model is undecided, c is near 0 and the token is trained as with SFT; where it is confident, c
    is near 1 and the token is trained as with DFT, so that targets that contradict a confident model get a
    small weight. It has no parameters.
    """

    name: ClassVar[str] = "deft"
    needs_collision: ClassVar[bool] = True

    def weight(self, rows: TokenRows) -> Tensor:
        assert rows.collision is not None
        return torch.exp(-rows.collision * rows.nll)

    def formula(self) -> str:
        return "p ** c, where c is the sum of the squares of all probabilities"
