"""Valid ranges of numeric flags.

A range is part of the annotation of its field, `max_length: Annotated[int, Bounds(minimum=2)]`, and is
checked when the command line is parsed.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from dft.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Valid range of a flag, or of each value if the flag takes several.

    Attributes:
        minimum: the smallest valid value.
        above: exclusive lower bound.
        maximum: the largest valid value.
        below: exclusive upper bound.
        reason: a clause that explains the lower bound, printed after it.
    """

    minimum: float = -math.inf
    above: float = -math.inf
    maximum: float = math.inf
    below: float = math.inf
    reason: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise `UserError` if a value of the flag `--name` is out of range. None is always valid."""
        values = value if isinstance(value, list) else [value]
        faults = [fault for number in values if number is not None and (fault := self._fault(number))]
        if faults:
            shown = " ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in values)
            subject = "each value must be" if isinstance(value, list) else "must be"
            raise UserError(f"--{name} {shown}: {subject} {faults[0]}")

    def __str__(self) -> str:
        limits = (
            ("at least", self.minimum),
            ("greater than", self.above),
            ("at most", self.maximum),
            ("less than", self.below),
        )
        return " and ".join(f"{words} {limit:,}" for words, limit in limits if math.isfinite(limit))

    def _fault(self, number: float) -> str | None:
        """Return the violated bound as text, or None if the number is in range."""
        if isinstance(number, float) and not math.isfinite(number):  # overflows for huge integers
            return "a finite number"
        reason = f", {self.reason}" if self.reason else ""
        if number < self.minimum:
            return f"at least {self.minimum:,}{reason}"
        if number <= self.above:
            return f"greater than {self.above:,}{reason}"
        if number > self.maximum:
            return f"at most {self.maximum:,}"
        return f"less than {self.below:,}" if number >= self.below else None


def declared_bounds(kind: type) -> dict[str, Bounds]:
    """Return the bounds in the annotations of a dataclass, by field name."""
    return {
        name: item
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is Annotated
        for item in get_args(hint)
        if isinstance(item, Bounds)
    }


def check_bounds(arguments: Any, inherited: dict[str, Bounds] | None = None) -> None:
    """Raise `UserError` for the first field of a dataclass that is out of range.

    Args:
        arguments: an instance of a dataclass of flags.
        inherited: ranges of fields inherited from a base class of another library.
    """
    for name, limits in {**(inherited or {}), **declared_bounds(type(arguments))}.items():
        limits.check(name, vars(arguments)[name])
