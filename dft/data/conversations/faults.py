"""What is wrong with a line of a file, and how all of it is told at once."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dft.errors import UserError

LISTED = 20
"""Faults that an error lists before it only counts."""


class BadLine(ValueError):
    """One conversation that cannot be used.

    Args:
        reason: the whole reason, without file and line.
        kind: what the reason is counted under when there are too many to list.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Fault(NamedTuple):
    """A `BadLine` and where it stands (`file:line`)."""

    where: str
    kind: str
    reason: str


class Faults:
    """The faults of all files, told in one error: the first ones in full, all of them counted by kind."""

    def __init__(self) -> None:
        self.listed: list[Fault] = []
        self.kinds: Counter[str] = Counter()

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            if len(self.listed) < LISTED:
                self.listed.append(fault)
            self.kinds[fault.kind] += 1

    def raise_if_any(self) -> None:
        """Raises `UserError` if there was a fault."""
        total = self.kinds.total()
        if not total:
            return
        heading = "1 conversation cannot be used:" if total == 1 else f"{total} conversations cannot be used:"
        lines = [heading, *(f"  {fault.where}: {fault.reason}" for fault in self.listed)]
        if total > len(self.listed):
            lines.append(f"  ... and {total - len(self.listed)} more. All of them:")
            lines += [f"  {count} x {kind}" for kind, count in self.kinds.most_common()]
        raise UserError("\n".join(lines))
