"""The table of row forms. A new form needs a new file and one entry here."""

from collections.abc import Collection, Iterable
from typing import Any

from dft.data.conversations.alpaca import ALPACA
from dft.data.conversations.column_meanings import MEANING_OF
from dft.data.conversations.faults import BadLine
from dft.data.conversations.messages import MESSAGES
from dft.data.conversations.preferences import CHOSEN, REJECTED
from dft.data.conversations.prompt_completion import PROMPT_COMPLETION
from dft.data.conversations.query_response import QUERY_RESPONSE
from dft.data.conversations.question_answer_pairs import QUESTION_ANSWER_PAIRS
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.row_rules import RowRules
from dft.data.conversations.row_weight import WEIGHT_COLUMNS
from dft.data.conversations.sharegpt import SHAREGPT
from dft.data.conversations.turns import Row
from dft.strict_json import shorten

FORMS: tuple[RowForm, ...] = (
    MESSAGES,
    SHAREGPT,
    QUESTION_ANSWER_PAIRS,
    ALPACA,
    QUERY_RESPONSE,
    PROMPT_COMPLETION,
)
"""All row forms. A row that has the keys of several forms is an error."""
SHARED_COLUMNS = ("tools", "functions", "system", "chat_template_kwargs", *WEIGHT_COLUMNS)
"""Columns that a row of any form may have."""
TEXT_COLUMNS = ("text", "content", "raw_content")
"""Columns in which pretraining data holds its text."""
CONTENT_COLUMNS = ("instruction", "input", "query", "prompt", "question", "context", "history")
"""Columns that are probably part of a conversation whose texts are columns."""
RENAME = "--columns NAME=COLUMN reads a column under another name"


def find_form(row: Row) -> RowForm | None:
    """Return the form of a row without null columns, or None if it has no form.

    Raises:
        BadLine: the row has the keys of several forms, or a column that its form would leave out and that is
            probably part of the conversation.
    """
    if len(row) == 1 and MESSAGES.keys[0] in row:
        return MESSAGES  # fast path: most rows have no other column
    forms = matching_forms(row)
    if not forms:
        return None
    if len(forms) > 1:
        names = " and ".join(_keys_of(form) for form in forms)
        raise BadLine(
            f"the row can be read in {len(forms)} ways, by {names}; leave the columns of the others out with "
            "--ignore_columns",
            "a row of several forms",
        )
    (form,) = forms
    if not form.is_list:
        _check_parts_used(row, form)
    return form


def matching_forms(keys: Collection[str]) -> list[RowForm]:
    """Return the forms of which a row with these keys (a dict, or a list of columns) has all keys."""
    return [form for form in FORMS if all(key in keys for key in form.keys)]


def unread_columns(row: Row, form: RowForm) -> tuple[str, ...]:
    """Return the columns of a row that are not part of its conversation."""
    return tuple(key for key in row if key not in form.columns and key not in SHARED_COLUMNS)


def _check_parts_used(row: Row, form: RowForm) -> None:
    """Check that a form whose texts are columns leaves out no column with a part of the conversation."""
    unread = [key for key in unread_columns(row, form) if row[key] not in ("", [])]
    if form is QUERY_RESPONSE and "query" not in row:
        suspects = [key for key in unread if key not in MEANING_OF]
        hint = "'response' without 'query' is read only where there is no other column"
    else:
        suspects = [key for key in unread if key in CONTENT_COLUMNS]
        hint = f"the row is read by {_keys_of(form)}"
    if suspects:
        raise BadLine(
            f"{hint}, and the row also has '{suspects[0]}'; {RENAME}, --ignore_columns {suspects[0]} leaves "
            "it out",
            f"'{suspects[0]}' is not read",
        )


def columns() -> tuple[str, ...]:
    """Return the names of all columns that a row form reads."""
    return (*dict.fromkeys(key for form in FORMS for key in form.columns), *SHARED_COLUMNS)


def may_hold_conversation(names: Iterable[str], rules: RowRules) -> bool:
    """Return whether rows with these columns, already renamed, can be conversations."""
    names = list(names)
    return bool(matching_forms(names)) or (any(name in CHOSEN for name in names))


def describe_forms() -> str:
    """Return the keys of all forms as text: "'messages', 'conversations' or 'prompt' with 'completion'"."""
    *others, last = map(_keys_of, FORMS)
    return f"{', '.join(others)} or {last}"


def _keys_of(form: RowForm) -> str:
    return " with ".join(f"'{key}'" for key in form.keys)


def no_form(names: Iterable[str], is_table: bool = False) -> BadLine:
    """Return the error for a row, or for a table, without a conversation.

    Args:
        names: the columns that are not null.
        is_table: whether they are the columns of a table.
    """
    names = list(names)
    pair = [name for name in names if name in (*CHOSEN, *REJECTED)]
    if pair:
        return BadLine(
            f"'{pair[0]}' makes this a preference pair; --use_chosen True trains on the chosen answer",
            "a preference pair",
        )
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    if text is not None and not any(name in CONTENT_COLUMNS for name in names):
        return BadLine(
            f"'{text}' without turns is text for pretraining, but this trainer fine-tunes on conversations "
            f"and learns only their answers; {RENAME}",
            "text for pretraining",
        )
    listed = f"the keys are {shorten(sorted(names))}" if names else "the object is empty"
    kind = "no conversation"
    if is_table:
        listed, kind = f"the columns are {', '.join(names)}", "no conversation in the columns"
    return BadLine(f"no conversation; {listed}, expected {describe_forms()}; {RENAME}", kind)


def append_answer(row: Row, answer: str) -> Row:
    """Append an assistant turn to a row, unless the row already ends with one or has no known form."""
    rows: Iterable[Any] = (form.append_answer(row, answer) for form in FORMS)
    return next((answered for answered in rows if answered is not None), row)
