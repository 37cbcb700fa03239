"""The objectives: how much each token weighs. One class each, all on the same path through the loss.

The loss is `sum_t (w_t * nll_t + kl_weight * kl_t) / N` over the N supervised tokens of an optimizer step.
The weight w_t is detached and depends on the token's own row of logits alone, so its gradient on these is
w_t * (softmax - onehot) / N, whatever the objective. Where w_t is a function of p_t, and so of nll_t, what
training descends in fact is a potential: the integral of w from 0 to nll_t.

To add one, write a class with a `name`, its parameters as fields, `weight` and, where there is one,
`potential`; put it into `OBJECTIVES`, and a row into the table of tests/loss/test_objectives.py. The command
line has it as `--objective NAME --objective_args FIELD=VALUE`.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

FARTHEST, POINTS = 32.0, 8193
"""Up to which nll, and at how many points from 0 on, a potential is integrated that has no formula."""


class Rows(NamedTuple):
    """What an objective sees of some supervised tokens, detached.

    Attributes:
        nll: (tokens,) negative log-likelihood of the target, in nats.
        p_correct: (tokens,) exp(-nll).
        entropy: (tokens,) of the model's distribution, in nats.
        top_logits: (tokens, largest) the largest logits of each row in descending order, as many as the
            objective's `largest`; None where that is 0.
    """

    nll: Tensor
    p_correct: Tensor
    entropy: Tensor
    top_logits: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What training descends. Fields are its parameters; one out of range is a `ValueError`.

    Attributes:
        name: on the command line.
        largest: how many of a row's largest logits `weight` looks at.
        kl_weight: how much the divergence from a base model counts; 0 needs none.
    """

    name: ClassVar[str]
    largest: ClassVar[int] = 0
    kl_weight: ClassVar[float] = 0.0

    def weight(self, rows: Rows) -> Tensor:
        """(tokens,) the weight of each token, at least 0."""
        raise NotImplementedError

    def potential(self, nll: Tensor) -> Tensor | None:
        """(tokens,) what training descends, as a function of nll; None where the weight is none of p."""
        return None

    @property
    def line(self) -> tuple[float, float] | None:
        """(a, b) where the weight is a * p + b, which a kernel can take on the way; else None."""
        return None

    def formula(self) -> str:
        """The weight in plain text, for people."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The name with its parameters, for people; alpha, which has a place of its own, left out."""
        told = [f"{one.name} {vars(self)[one.name]:g}" for one in fields(self) if one.name != "alpha"]
        return self.name.upper() + (f" ({', '.join(told)})" if told else "")


def within(name: str, value: float, low: float, high: float, remark: str = "") -> None:
    """Raises ValueError where a parameter is not in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]{remark}, got {value}")


@dataclass(frozen=True)
class Dft(Objective):
    """Dynamic Fine-Tuning (arXiv 2508.05629, Eq. 9): w = alpha * p + (1 - alpha).

    For a model that knows the domain (mean p above about 0.5): it sharpens what the model half knows and
    leaves alone what it finds absurd. alpha = 1 is the paper's; less puts a floor of 1 - alpha under w.
    """

    name: ClassVar[str] = "dft"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        within("alpha", self.alpha, 0, 1, " (0 is SFT, 1 is the paper's DFT)")

    def weight(self, rows: Rows) -> Tensor:
        return self.alpha * rows.p_correct + (1 - self.alpha)

    def potential(self, nll: Tensor) -> Tensor:
        return self.alpha * -torch.expm1(-nll) + (1 - self.alpha) * nll

    @property
    def line(self) -> tuple[float, float]:
        return self.alpha, 1 - self.alpha

    def formula(self) -> str:
        return "1" if self.alpha == 0 else "alpha * p + (1 - alpha)"

    @property
    def title(self) -> str:
        return Sft().title if self.alpha == 0 and type(self) is Dft else super().title


@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning, plain cross-entropy: w = 1.

    For what the model does not know yet: new facts, formats, languages (mean p below about 0.1).
    """

    name: ClassVar[str] = "sft"

    def weight(self, rows: Rows) -> Tensor:
        return torch.ones_like(rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return nll

    @property
    def line(self) -> tuple[float, float]:
        return 0.0, 1.0

    def formula(self) -> str:
        return "1"


@dataclass(frozen=True)
class Power(Objective):
    """Descends (1 - p^k) / k (arXiv 2510.00526): w = p^k.

    k = 1 is DFT, k towards 0 is SFT, k > 1 leans on the prior still more. For models between strong and weak
    try k of about 0.5; in contrast to alpha it puts no floor under the weight.
    """

    name: ClassVar[str] = "power"
    k: float = 0.5

    def __post_init__(self) -> None:
        within("k", self.k, 0.001, 100)

    def weight(self, rows: Rows) -> Tensor:
        return torch.exp(-self.k * rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return -torch.expm1(-self.k * nll) / self.k

    def formula(self) -> str:
        return "p ** k"


@dataclass(frozen=True)
class Threshold(Objective):
    """Descends -log p of the tokens with p >= q alone (arXiv 2510.00526): w = 1 where p >= q, else 0.

    For data with wrong tokens among the right ones: what the model holds to be unlikely is left out entirely.
    """

    name: ClassVar[str] = "threshold"
    q: float = 0.1

    def __post_init__(self) -> None:
        within("q", self.q, 0, 1)

    def weight(self, rows: Rows) -> Tensor:
        return (rows.p_correct >= self.q).to(rows.nll.dtype)

    def potential(self, nll: Tensor) -> Tensor:
        # Continuous, and level where nothing is learned.
        return nll.clamp(max=-math.log(self.q)) if self.q > 0 else nll

    def formula(self) -> str:
        return "1 where p >= q, else 0"


@dataclass(frozen=True)
class Eaft(Objective):
    """Entropy-Adaptive Fine-Tuning (arXiv 2601.02151): w = entropy of the 20 likeliest tokens / ln 20.

    The 20 probabilities are normalized to sum to 1 first, so w is in [0, 1]. For teaching something new while
    forgetting little: tokens on which the model is sure, and which contradict the data, weigh little.
    """

    name: ClassVar[str] = "eaft"
    largest: ClassVar[int] = 20

    def weight(self, rows: Rows) -> Tensor:
        log_p = torch.log_softmax(rows.top_logits, -1)
        found = torch.special.entr(log_p.exp()).sum(-1)
        return found / math.log(self.largest)

    def formula(self) -> str:
        return "entropy of the 20 likeliest tokens / ln 20"


@dataclass(frozen=True)
class Asft(Dft):
    """Anchored Supervised Fine-Tuning (arXiv 2509.23753): DFT, and kl_weight * KL(model || base) per token.

    The divergence is over the whole vocabulary at each supervised token, in the direction of the paper's
    text; the code its authors published computes KL(base || model) instead. For DFT where it drifts, as in
    knowledge-heavy domains. Needs a frozen copy of the base model in memory, and its forward pass.
    """

    name: ClassVar[str] = "asft"
    kl_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        within("kl_weight", self.kl_weight, 0, 1000)

    def formula(self) -> str:
        return f"{super().formula()}, and {self.kl_weight:g} * KL(model || base)"


@dataclass(frozen=True)
class Chord(Objective):
    """The token weight of CHORD (arXiv 2508.11408): w = p * (1 - p).

    Learns from tokens the model wavers on; neither what it knows already nor what it holds to be impossible
    moves it. Gradients are at most a quarter of SFT's, so the learning rate wants to be larger.
    """

    name: ClassVar[str] = "chord"

    def weight(self, rows: Rows) -> Tensor:
        return rows.p_correct * -torch.expm1(-rows.nll)

    def potential(self, nll: Tensor) -> Tensor:
        return torch.expm1(-nll).square() / 2

    def formula(self) -> str:
        return "p * (1 - p)"


OBJECTIVES: dict[str, type[Objective]] = {
    one.name: one for one in (Dft, Sft, Power, Threshold, Eaft, Asft, Chord)
}


def make_objective(name: str, parameters: Mapping[str, float] | None = None) -> Objective:
    """An objective by name.

    Args:
        parameters: by the names of its fields; those left out have their defaults.

    Raises:
        ValueError: no such objective, no such parameter, or a value out of range; says what there is.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective is named {name!r}; choose from {', '.join(OBJECTIVES)}")
    chosen = OBJECTIVES[name]
    known = [one.name for one in fields(chosen)]
    for given in parameters or {}:
        if given not in known:
            raise ValueError(
                f"the objective {name} has no {given!r}; it has {', '.join(known) or 'no parameters'}"
            )
    return chosen(**parameters or {})


def parameters_of(name: str) -> dict[str, float]:
    """The parameters of an objective, each with its default."""
    return {one.name: one.default for one in fields(OBJECTIVES[name]) if one.default is not MISSING}


def lifted(weight: Tensor, min_weight: Tensor | None) -> Tensor:
    """(tokens,) weights, none below its floor."""
    return weight if min_weight is None else torch.maximum(weight, min_weight.to(weight.dtype))


def floored_potential(objective: Objective, nll: Tensor, min_weight: float) -> Tensor:
    """(tokens,) the integral of the weight from 0 to nll, where no weight is below a floor.

    By the trapezoidal rule: off by less than 2e-4, or by 2e-3 where the weight jumps; beyond an nll of 32 it
    goes on in a straight line.

    Args:
        objective: its weight is a function of p.
        nll: (tokens,) float64.
    """
    points = torch.linspace(0, FARTHEST, POINTS, dtype=nll.dtype, device=nll.device)
    step = FARTHEST / (POINTS - 1)
    rows = Rows(points, torch.exp(-points), torch.zeros_like(points))
    weights = objective.weight(rows).clamp(min=min_weight)
    integral = torch.cat([weights.new_zeros(1), torch.cumulative_trapezoid(weights, dx=step)])
    below = (nll / step).nan_to_num(0).floor().clamp(0, POINTS - 2).long()
    return integral[below] + (integral[below + 1] - integral[below]) * (nll / step - below)
