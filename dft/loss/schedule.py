"""How alpha rises over a run: from SFT, which teaches what is new, to DFT, which sharpens what is known."""

import math
from dataclasses import dataclass, replace

from dft.errors import check_choice
from dft.loss.objectives import Dft, Objective

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class AlphaSchedule:
    """What share of its final alpha an objective has at a step.

    Attributes:
        kind: "constant" has all of it throughout; "linear" and "cosine" rise from 0, which is SFT, and stay.
        share: of the optimizer steps, over which alpha rises; with 1 it would arrive where the run ends.
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
        """In [0, 1]. `step` counts from 0, of `steps`."""
        if self.kind == "constant":
            return 1.0
        done = min(1.0, step / max(1.0, self.share * steps))
        return done if self.kind == "linear" else (1 - math.cos(math.pi * done)) / 2


CONSTANT = AlphaSchedule()


def check_schedule(objective: Objective, schedule: AlphaSchedule, end_of_turn_weight: float) -> None:
    """Raises ValueError for a schedule without an alpha, and for a floor outside [0, 1]."""
    if schedule.kind != "constant" and not isinstance(objective, Dft):
        raise ValueError(f"alpha_schedule {schedule.kind!r}: {objective} has no alpha")
    if not 0 <= end_of_turn_weight <= 1:
        raise ValueError(f"end_of_turn_weight must lie in [0, 1], got {end_of_turn_weight}")


def scheduled(objective: Objective, schedule: AlphaSchedule, step: int, steps: int) -> Objective:
    """The objective as it is at a step."""
    if schedule.kind == "constant":
        return objective
    return replace(objective, alpha=objective.alpha * schedule.at(step, steps))


def method_title(objective: Objective, schedule: AlphaSchedule, end_of_turn_weight: float) -> str:
    """The objective with whatever else decides what a token weighs, for people."""
    alpha = alpha_of(objective)
    told = objective.title + ("" if alpha is None else f", alpha {alpha:g}")
    if schedule.kind != CONSTANT.kind:
        told += f" after a {schedule.kind} rise over {100 * schedule.share:g} % of the steps"
    if end_of_turn_weight:
        told += f"; ends of turns weigh at least {end_of_turn_weight:g}"
    return told


def alpha_of(objective: Objective) -> float | None:
    """Its alpha; None where it has none."""
    return objective.alpha if isinstance(objective, Dft) else None
