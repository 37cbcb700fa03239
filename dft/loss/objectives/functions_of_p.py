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
    it. Gradients are at most a quarter of SFT's, which an optimizer like AdamW makes up for.
    """

    name: ClassVar[str] = "chord"

    def weight(self, rows: TokenRows) -> Tensor:
        return rows.p_correct * -torch.expm1(-rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return torch.expm1(-nll).square() / 2

    def formula(self) -> str:
        return "p * (1 - p)"


@dataclass(frozen=True)
class InfoSft(Objective):
    """InfoSFT (arXiv 2605.14967): w = p * max(0, 1 - logit(p) / logit(p_max)), logit(p) = log(p / (1 - p)).

    Up to the factor logit(p_max) this is p * (C - logit(p)) with C = logit(p_max), without the negative part,
    as in the code of its authors. The weight is largest for tokens of medium probability, and 0 for tokens
    that the model already gives a probability above p_max. The default is that of the authors.
    """

    name: ClassVar[str] = "infosft"
    p_max: float = 0.93

    def __post_init__(self) -> None:
        check_range("p_max", self.p_max, 0.55, 0.9999)

    @property
    def _largest_logit(self) -> float:
        return math.log(self.p_max / (1 - self.p_max))

    def weight(self, rows: TokenRows) -> Tensor:
        # Above, p is 0, and 0 * inf would be NaN; rounding may take a certain token's nll below 0.
        nll = rows.nll.clamp(0, 1e4)
        logit = -nll - torch.log(-torch.expm1(-nll))
        return torch.exp(-nll) * (1 - logit / self._largest_logit).clamp(min=0)

    def potential(self, nll: Tensor) -> Tensor:
        # The integral of logit(u) is minus the binary entropy of u.
        p, q = torch.exp(-nll), -torch.expm1(-nll)
        entropy = torch.special.entr(p) + torch.special.entr(q)
        largest_entropy = -self.p_max * math.log(self.p_max) - (1 - self.p_max) * math.log(1 - self.p_max)
        potential = self.p_max - p + (largest_entropy - entropy) / self._largest_logit
        return torch.where(p >= self.p_max, 0.0, potential)

    def formula(self) -> str:
        return "p * max(0, 1 - logit(p) / logit(p_max))"


@dataclass(frozen=True)
class Talr(Objective):
    """Token-Adaptive Loss Reweighting (arXiv 2509.20758): w = max(p^(1 / tau), floor).

    A temperature tau below 1 suppresses unlikely tokens more than DFT does, and one above 1 less; the floor
    keeps every token in training. The paper takes tau from the losses of each batch, so that the weight of a
    token depends on the tokens beside it. Here tau is a number, so that it does not: for the same effect set
    it to the median nll of the sequences, or to the logged `nll`.
    """

    name: ClassVar[str] = "talr"
    tau: float = 1.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_range("tau", self.tau, 0.01, 1000)
        check_range("floor", self.floor, 0, 1)

    def weight(self, rows: TokenRows) -> Tensor:
        return torch.exp(-rows.nll / self.tau).clamp(min=self.floor)

    def potential(self, nll: Tensor) -> Tensor:
        start = self.tau * -math.log(self.floor) if self.floor else math.inf
        above = self.tau * -torch.expm1(-nll.clamp(max=start) / self.tau)
        return above + (self.floor * (nll - start).clamp(min=0) if self.floor else 0)

    @property
    def least_weight(self) -> float:
        return self.floor

    def formula(self) -> str:
        return "max(p ** (1 / tau), floor)"


@dataclass(frozen=True)
class Luffy(Objective):
    """The policy shaping of LUFFY (arXiv 2504.14945): w = gamma * p / (p + gamma)^2.

    It maximizes p / (p + gamma). The weight is largest, 1/4, at p = gamma: for tokens that the model
    considers unlikely, but not impossible. This is what LUFFY applies to the tokens of demonstrations, at an
    advantage of 1 and without its reinforcement learning. The default is that of its authors. Gradients are
    at most a quarter of SFT's, which an optimizer like AdamW makes up for.
    """

    name: ClassVar[str] = "luffy"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0001, 100)

    def weight(self, rows: TokenRows) -> Tensor:
        return self.gamma * rows.p_correct / (rows.p_correct + self.gamma).square()

    def potential(self, nll: Tensor) -> Tensor:
        scale = self.gamma / (1 + self.gamma)
        return scale * -torch.expm1(-nll) / (torch.exp(-nll) + self.gamma)

    def formula(self) -> str:
        return "gamma * p / (p + gamma) ** 2"
