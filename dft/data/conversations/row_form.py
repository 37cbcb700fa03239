"""The definition of a row form."""

from collections.abc import Callable
from dataclasses import dataclass

from dft.data.conversations.turns import Row, Turn


@dataclass(frozen=True)
class RowForm:
    """A format in which a row stores a conversation.

    Attributes:
        name: name of the form in documentation.
        keys: a row has this form if it has all these keys, none of them null.
        read: validates the turns of a row of this form, which has no null columns. Raises `BadLine`.
        append_answer: appends an assistant turn with the given text to an unvalidated row, for
            evaluation data with the answer in a separate column. Returns the row unchanged if it
            already ends with an assistant turn, and None if it does not have this form.
        example: a row of this form.
        optional: further columns that `read` uses if the row has them.
        is_list: whether the form holds a whole conversation as a list of turns. The text of other forms is
            spread over columns, so an unread column may be a forgotten part of the conversation.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], list[Turn]]
    append_answer: Callable[[Row, str], Row | None]
    example: Row
    optional: tuple[str, ...] = ()
    is_list: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that `read` uses."""
        return self.keys + self.optional
