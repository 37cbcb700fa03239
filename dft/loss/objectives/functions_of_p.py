"""Objectives whose weight is a function of the probability of the target token."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dft.loss.objectives.base import Objective, TokenRows, check_range


@dataclass(frozen=True)
class Dft(Objective):
    """Dynamic Fine-Tuning (arXiv 2508.05629, Eq. 9): w = alpha * p + (1 - alpha).

    Suited to models that know the domain (mean p above about 0.5): it reinforces tokens the model already
    considers likely and hardly changes those it considers very unlikely. alpha = 1 is the paper's objective;
    a smaller alpha keeps every weight at or above 1 - alpha.
    """

    name: ClassVar[str] = "dft"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, 1, " (0 is SFT, 1 is the paper's DFT)")

    def weight(self, rows: TokenRows) -> Tensor:
        return self.alpha * rows.p_correct + (1 - self.alpha)

    def potential(self, nll: Tensor) -> Tensor:
        return self.alpha * -torch.expm1(-nll) + (1 - self.alpha) * nll

    @property
    def affine(self) -> tuple[float, float]:
        return self.alpha, 1 - self.alpha

    def formula(self) -> str:
        return "1" if self.alpha == 0 else "alpha * p + (1 - alpha)"

    @property
    def title(self) -> str:
        return Sft().title if self.alpha == 0 and type(self) is Dft else super().title


@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning, plain cross-entropy: w = 1.

    Suited to data the model does not know yet: new facts, formats, languages (mean p below about 0.1).
    """

    name: ClassVar[str] = "sft"

    def weight(self, rows: TokenRows) -> Tensor:
        return torch.ones_like(rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return nll

    @property
    def affine(self) -> tuple[float, float]:
        return 0.0, 1.0

    def formula(self) -> str:
        return "1"


@dataclass(frozen=True)
class Power(Objective):
    """Minimizes (1 - p^k) / k (arXiv 2510.00526): w = p^k.

    k = 1 is DFT, k towards 0 is SFT, and k > 1 relies on the model's own distribution more than DFT does. For
    a model of medium strength in the domain try k = 0.5; unlike alpha, k sets no lower bound on the weight.
    """

    name: ClassVar[str] = "power"
    k: float = 0.5

    def __post_init__(self) -> None:
        check_range("k", self.k, 0.001, 100)

    def weight(self, rows: TokenRows) -> Tensor:
        return torch.exp(-self.k * rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return -torch.expm1(-self.k * nll) / self.k

    def formula(self) -> str:
        return "p ** k"


@dataclass(frozen=True)
class Threshold(Objective):
    """Minimizes -log p only for tokens with p >= q (arXiv 2510.00526): w = 1 if p >= q, else 0.

    Suited to data that contains wrong tokens: those the model considers unlikely are ignored completely.
    """

    name: ClassVar[str] = "threshold"
    q: float = 0.1

    def __post_init__(self) -> None:
        check_range("q", self.q, 0, 1)

    def weight(self, rows: TokenRows) -> Tensor:
        return (rows.p_correct >= self.q).to(rows.nll.dtype)

    def potential(self, nll: Tensor) -> Tensor:
        # Continuous, and constant where the weight is 0.
        return nll.clamp(max=-math.log(self.q)) if self.q > 0 else nll

    def formula(self) -> str:
        return "1 if p >= q, else 0"


@dataclass(frozen=True)
class Chord(Objective):
    """The token weight of CHORD (arXiv 2508.11408): w = p * (1 - p).

    Learns from tokens the model is uncertain about; tokens it considers certain or impossible hardly change
    it. Gradients are at most a quarter of SFT's, so use a larger learning rate.
    """

    name: ClassVar[str] = "chord"

    def weight(self, rows: TokenRows) -> Tensor:
        return rows.p_correct * -torch.expm1(-rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return torch.expm1(-nll).square() / 2

    def formula(self) -> str:
        return "p * (1 - p)"
