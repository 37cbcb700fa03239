"""The table of row forms. A new form needs a new file and one entry here."""

from collections.abc import Container

from dft.data.conversations.messages import MESSAGES
from dft.data.conversations.prompt_completion import PROMPT_COMPLETION
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.sharegpt import SHAREGPT
from dft.data.conversations.turns import Row

FORMS: tuple[RowForm, ...] = (
    MESSAGES,
    SHAREGPT,
    PROMPT_COMPLETION,
)
"""All row forms. If a row has the keys of several forms, the first one applies."""
SHARED_COLUMNS = ("tools", "system", "chat_template_kwargs")
"""Columns that a row of any form may have."""


def find_form(keys: Container[str]) -> RowForm | None:
    """Return the form of a row with these keys (a dict, or a list of columns), or None if it has no form."""
    return next((form for form in FORMS if all(key in keys for key in form.keys)), None)


def columns() -> tuple[str, ...]:
    """Return the names of all columns that are read; others are ignored."""
    return (*dict.fromkeys(key for form in FORMS for key in form.keys), *SHARED_COLUMNS)


def describe_forms() -> str:
    """Return the keys of all forms as text: "'messages', 'conversations' or 'prompt' with 'completion'"."""
    *others, last = (" with ".join(f"'{key}'" for key in form.keys) for form in FORMS)
    return f"{', '.join(others)} or {last}"


def append_answer(row: Row, answer: str) -> Row:
    """Append an assistant turn to a row, unless the row already ends with one or has no known form."""
    rows = (form.append_answer(row, answer) for form in FORMS)
    return next((answered for answered in rows if answered is not None), row)
