"""Rules for reading the rows of a data file: renamed, ignored and filtered columns, and names of roles.

The rules come from flags and from dataset_info.json. They are part of the cache key.
"""

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


class RowLeftOut(Exception):
    """Raised for a row that `--keep_rows` leaves out. Its text is the condition."""


@dataclass(frozen=True)
class TurnNames:
    """Names that the turns of a file use in place of `from`, `value` and ShareGPT's roles.

    Attributes:
        role_key, text_key: keys of the role and of the text.
        roles: (name in the file, ShareGPT's name) of each role that differs.
    """

    role_key: str
    text_key: str
    roles: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RowRules:
    """Rules for the rows of one file.

    Attributes:
        columns: (name that a row form uses, column of the file) of each renamed column.
        ignored: columns to ignore.
        kept: (column, accepted values) of each condition that a row must fulfil, with values as text.
        use_chosen: whether a preference pair stands for its chosen answer.
        evaluation: whether the file is evaluated on, not trained on.
        mapped_only: whether only the columns in `columns` are part of a conversation.
        turns: names of roles and keys of the turns, or None for the usual ones.
    """

    columns: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[tuple[str, tuple[str, ...]], ...] = ()
    use_chosen: bool = False
    evaluation: bool = False
    mapped_only: bool = False
    turns: TurnNames | None = None
    named: frozenset[str] = field(init=False, repr=False, compare=False)
    """Columns of the file that `columns`, `ignored` or `kept` name."""
    change_rows: bool = field(init=False, repr=False, compare=False)
    """True if the rules can change a row."""

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns of the conditions."""
        return tuple(column for column, _ in self.kept)

    def __post_init__(self) -> None:
        names = [column for _, column in self.columns]
        object.__setattr__(self, "named", frozenset([*names, *self.kept_columns, *self.ignored]))
        changes = self.named or self.use_chosen or self.mapped_only or self.turns is not None
        object.__setattr__(self, "change_rows", bool(changes))


NO_RULES = RowRules()
