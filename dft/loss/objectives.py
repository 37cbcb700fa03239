"""Training objectives: the rules that weight each token, one class each.

The loss is `sum_t (w_t * nll_t + kl_weight * kl_t) / N` over the N supervised tokens of an optimizer step.
The weight w_t is detached and depends only on the token's own row of logits, so for every objective the
gradient on these logits is w_t * (softmax - onehot) / N. If w_t is a function of p_t, and therefore of nll_t,
training minimizes a potential: the integral of w from 0 to nll_t.

To add an objective, write a class with a `name`, its parameters as fields, `weight`, `formula` and, if there
is one, `potential`; add it to `OBJECTIVES`, and a row to the table of tests/loss/test_objectives.py. On the
command line it is `--objective NAME --objective_args FIELD=VALUE`.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

MAX_NLL, POINTS = 32.0, 8193
"""Range [0, MAX_NLL] and number of points of the numerical integration of a potential without a formula."""


class TokenRows(NamedTuple):
    """Detached statistics of supervised tokens from which an objective computes weights.

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
    """Base class of the objectives. Fields are parameters; a value out of range raises `ValueError`.

    Attributes:
        name: name on the command line.
        largest: number of largest logits of each row that `weight` uses.
        kl_weight: factor on the KL divergence from a base model; 0 if the objective needs no base model.
    """

    name: ClassVar[str]
    largest: ClassVar[int] = 0
    kl_weight: ClassVar[float] = 0.0

    def weight(self, rows: TokenRows) -> Tensor:
        """Return the weight of each token, (tokens,), at least 0."""
        raise NotImplementedError

    def potential(self, nll: Tensor) -> Tensor | None:
        """Return the minimized potential, (tokens,), or None if the weight is not a function of p."""
        return None

    @property
    def affine(self) -> tuple[float, float] | None:
        """(a, b) if the weight is a * p + b, which takes a single kernel launch; otherwise None."""
        return None

    def formula(self) -> str:
        """Return the formula of the weight as text."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Name and parameters as text, without alpha, which is always shown separately."""
        parameters = [
            f"{field.name} {vars(self)[field.name]:g}" for field in fields(self) if field.name != "alpha"
        ]
        return self.name.upper() + (f" ({', '.join(parameters)})" if parameters else "")


def check_range(name: str, value: float, low: float, high: float, remark: str = "") -> None:
    """Raise ValueError if a parameter is not in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]{remark}, got {value}")


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
class Asft(Dft):
    """Anchored Supervised Fine-Tuning (arXiv 2509.23753): DFT plus kl_weight * KL(model || base) per token.

    The divergence is over the whole vocabulary at each supervised token, in the direction given in the text
    of the paper; the code published by its authors computes KL(base || model) instead. Suited to domains
    where DFT drifts from the base model, such as knowledge-heavy ones. Needs a frozen copy of the base model
    in memory, and a forward pass of it per batch.
    """

    name: ClassVar[str] = "asft"
    kl_weight: float = 0.05  # type: ignore[misc]  # a parameter here, a constant of the others

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("kl_weight", self.kl_weight, 0, 1000)

    def formula(self) -> str:
        return f"{super().formula()}, and {self.kl_weight:g} * KL(model || base)"


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


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Dft, Sft, Power, Threshold, Eaft, Asft, Chord)
}
"""All objectives by name, in the order in which they are listed to users."""


def make_objective(name: str, parameters: Mapping[str, float] | None = None) -> Objective:
    """Create an objective by name.

    Args:
        parameters: values of its fields; fields that are missing keep their defaults.

    Raises:
        ValueError: unknown objective or parameter (the message lists the valid ones), or a value out of
            range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {', '.join(OBJECTIVES)}")
    parameters = parameters or {}
    names = [field.name for field in fields(OBJECTIVES[name])]
    for parameter in parameters:
        if parameter not in names:
            valid = f"its parameters are {', '.join(names)}" if names else "it has no parameters"
            raise ValueError(f"the objective {name} has no parameter {parameter!r}; {valid}")
    return OBJECTIVES[name](**parameters)


def parameters_of(name: str) -> dict[str, float]:
    """Return the parameters of an objective that have a default, and their defaults."""
    return {field.name: field.default for field in fields(OBJECTIVES[name]) if field.default is not MISSING}


def resolve_objective(alpha: float | None, objective: Objective | None, has_base: bool) -> Objective:
    """Return the objective of a run: DFT with the given alpha (default 1), or another objective.

    Raises:
        ValueError: both are given, alpha is out of range, or `check_base` fails.
    """
    if objective is None:
        objective = Dft() if alpha is None else Dft(alpha)
    elif alpha is not None:
        raise ValueError(f"alpha {alpha} and the objective {objective} both set the token weight; pass one")
    check_base(objective, has_base)
    return objective


def check_base(objective: Objective, has_base: bool) -> None:
    """Raise ValueError if a required base model is missing, or if an unneeded one is passed."""
    if has_base != (objective.kl_weight > 0):
        verb = "does not use" if has_base else "needs the logits or hidden states of"
        raise ValueError(f"{objective} {verb} a base model")


def apply_floor(weight: Tensor, min_weight: Tensor | None) -> Tensor:
    """Return the (tokens,) weights, each raised to its lower bound if it is smaller."""
    return weight if min_weight is None else torch.maximum(weight, min_weight.to(weight.dtype))


def floored_potential(objective: Objective, nll: Tensor, min_weight: float) -> Tensor:
    """Return the integral of max(weight, min_weight) from 0 to nll, (tokens,).

    Uses the trapezoidal rule: the error is below 2e-4, or below 2e-3 if the weight has a jump. Beyond an nll
    of 32 the potential is extrapolated linearly.

    Args:
        objective: its weight must be a function of p.
        nll: (tokens,) float64.
    """
    points = torch.linspace(0, MAX_NLL, POINTS, dtype=nll.dtype, device=nll.device)
    step = MAX_NLL / (POINTS - 1)
    rows = TokenRows(points, torch.exp(-points), torch.zeros_like(points))
    weights = objective.weight(rows).clamp(min=min_weight)
    integral = torch.cat([weights.new_zeros(1), torch.cumulative_trapezoid(weights, dx=step)])
    below = (nll / step).nan_to_num(0).floor().clamp(0, POINTS - 2).long()
    return integral[below] + (integral[below + 1] - integral[below]) * (nll / step - below)
