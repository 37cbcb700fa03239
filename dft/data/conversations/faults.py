"""Errors in single conversations, combined into one error message."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dft.errors import UserError

MAX_LISTED = 20
"""Number of faults that an error message lists in full. The others are only counted."""


class BadLine(ValueError):
    """Raised when a conversation cannot be used.

    Args:
        reason: the full reason, without file and line.
        kind: category that the reason is counted under when there are too many to list.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Fault(NamedTuple):
    """The reason of a `BadLine` and its location (`file:line`)."""

    where: str
    kind: str
    reason: str


class Faults:
    """Collects the faults of all files. Lists the first few and counts all of them by kind."""

    def __init__(self) -> None:
        self.listed: list[Fault] = []
        self.kinds: Counter[str] = Counter()

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            if len(self.listed) < MAX_LISTED:
                self.listed.append(fault)
            self.kinds[fault.kind] += 1

    def raise_if_any(self) -> None:
        """Raise `UserError` if any fault was added."""
        total = self.kinds.total()
        if not total:
            return
        heading = "1 conversation cannot be used:" if total == 1 else f"{total} conversations cannot be used:"
        lines = [heading, *(f"  {fault.where}: {fault.reason}" for fault in self.listed)]
        if total > len(self.listed):
            lines.append(f"  ... and {total - len(self.listed)} more. All of them:")
            lines += [f"  {count} x {kind}" for kind, count in self.kinds.most_common()]
        raise UserError("\n".join(lines))
