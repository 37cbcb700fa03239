"""Intervals of logging, evaluating and saving, as a number of optimizer steps or as a share of the run."""

import math
from fractions import Fraction

INTERVALS = ("logging_steps", "eval_steps", "save_steps")
"""Flags whose values are a number of optimizer steps or, below 1, a share of those of the run."""


def interval(value: float, steps: int) -> float:
    """Return the number of optimizer steps that a flag of `INTERVALS` stands for in a run of `steps` steps.

    A share is rounded up to a whole step. transformers also rounds up what is only inexact arithmetic:
    0.1 * 70 is 7.000000000000001, for which it returns 8.
    """
    if value >= 1:
        return value
    return max(1, math.ceil(round(value * steps, 6)))


def is_multiple(value: float, of: float) -> bool | None:
    """Return whether one interval is a multiple of another; None if that depends on the length of the run."""
    if (value < 1) != (of < 1):
        return None
    return Fraction(str(value)) % Fraction(str(of)) == 0
