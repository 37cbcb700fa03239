"""What all objectives have in common, and the lower bound of their weights."""

from dataclasses import dataclass, fields
from numbers import Real
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
        base_logp: (tokens,) log-probability of the target under the untrained model, in nats; None unless
            the objective `needs_base_logp`.
        collision: (tokens,) sum of the squares of the model's probabilities, between 1 / vocab and 1; None
            unless the objective `needs_collision`.
    """

    nll: Tensor
    p_correct: Tensor
    entropy: Tensor
    top_logits: Tensor | None = None
    base_logp: Tensor | None = None
    collision: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """Base class of the objectives. Fields are parameters; a value out of range raises `ValueError`.

    Attributes:
        name: name on the command line.
        largest: number of largest logits of each row that `weight` uses.
        kl_weight: factor on the KL divergence from a base model; 0 if the objective needs no base model.
        needs_collision: whether `weight` uses the sum of the squares of the probabilities.
        needs_base_logp: whether `weight` uses the untrained model's log-probabilities (`--base_scores`).
    """

    name: ClassVar[str]
    largest: ClassVar[int] = 0
    kl_weight: ClassVar[float] = 0.0
    needs_collision: ClassVar[bool] = False
    needs_base_logp: ClassVar[bool] = False

    def weight(self, rows: TokenRows) -> Tensor:
        """Return the weight of each token, (tokens,), between 0 and 2, so that float16 gradients fit."""
        raise NotImplementedError

    def potential(self, nll: Tensor) -> Tensor | None:
        """Return the minimized potential, (tokens,), or None if the weight is not a function of p."""
        return None

    @property
    def affine(self) -> tuple[float, float] | None:
        """(a, b) if the weight is a * p + b, which takes a single kernel launch; otherwise None."""
        return None

    @property
    def least_weight(self) -> float:
        """A lower bound of the weight of any token."""
        return self.affine[1] if self.affine is not None else 0.0

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
    """Raise ValueError if a parameter is not a number in [low, high]."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}]{remark}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]{remark}, got {value}")


def check_base_logp(objective: Objective, base_logp: Tensor | None) -> None:
    """Raise ValueError if the untrained model's log-probabilities are missing although they are needed."""
    if objective.needs_base_logp and base_logp is None:
        raise ValueError(
            f"{objective} needs base_logp, the log-probabilities of the targets under the untrained model "
            "(--base_scores True)"
        )


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
