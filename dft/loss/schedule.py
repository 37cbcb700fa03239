"""Schedule of alpha over a run: from SFT, which learns new data, to DFT, which sharpens known data."""

import math
from dataclasses import dataclass, replace

from dft.errors import check_choice
from dft.loss.objectives import Dft, Objective, check_range

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class AlphaSchedule:
    """Schedule that scales an objective's alpha at each step.

    Attributes:
        kind: "constant" is 1 at every step; "linear" and "cosine" rise from 0 (SFT) to 1.
        share: fraction of the optimizer steps over which alpha rises, in (0, 1].
    """

    kind: str = "constant"
    share: float = 0.5

    def __post_init__(self) -> None:
        check_choice("alpha_schedule", self.kind, KINDS)
        if not 0 < self.share <= 1:
            raise ValueError(
                f"the share of an alpha schedule must be above 0 and at most 1, got {self.share}"
            )

    def at(self, step: int, steps: int) -> float:
        """Return the fraction, in [0, 1], at step `step` of `steps`, counted from 0."""
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, step / max(1.0, self.share * steps))
        return progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2


CONSTANT = AlphaSchedule()


def check_schedule(objective: Objective, schedule: AlphaSchedule, end_of_turn_weight: float) -> None:
    """Raise ValueError for a schedule of an objective without alpha, or a weight outside [0, 1]."""
    if schedule.kind != "constant" and not isinstance(objective, Dft):
        raise ValueError(f"alpha_schedule {schedule.kind!r}: {objective} has no alpha")
    check_range("end_of_turn_weight", end_of_turn_weight, 0, 1)


def scheduled(objective: Objective, schedule: AlphaSchedule, step: int, steps: int) -> Objective:
    """Return the objective with its scheduled alpha at a step."""
    if schedule.kind == "constant" or not isinstance(objective, Dft):
        return objective
    return replace(objective, alpha=objective.alpha * schedule.at(step, steps))


def method_title(objective: Objective, schedule: AlphaSchedule, end_of_turn_weight: float) -> str:
    """Describe the objective, its alpha, its schedule and its lower bound for end-of-turn tokens."""
    alpha = alpha_of(objective)
    title = objective.title + ("" if alpha is None else f", alpha {alpha:g}")
    if schedule.kind != CONSTANT.kind:
        title += f" after a {schedule.kind} rise over {100 * schedule.share:g} % of the steps"
    if end_of_turn_weight:
        title += f"; end-of-turn tokens weigh at least {end_of_turn_weight:g}"
    return title


def alpha_of(objective: Objective) -> float | None:
    """Return the alpha of an objective, or None if it has no alpha."""
    return objective.alpha if isinstance(objective, Dft) else None
