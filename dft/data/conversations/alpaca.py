"""Row form: `instruction`, `input` and `output`, as in the Alpaca data, with earlier turns in `history`."""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.history import append_text, read_history
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turns import Row, Turn, read_turn
from dft.strict_json import json_type_name


def _read(row: Row) -> list[Turn]:
    texts = [_text(row, name) for name in ("instruction", "input")]
    question = "\n".join(text for text in texts if text.strip())
    return [
        *read_history(row),
        read_turn("instruction", {"role": "user", "content": question}),
        read_turn("output", {"role": "assistant", "content": _text(row, "output")}),
    ]


def _text(row: Row, name: str) -> str:
    value: Any = row.get(name, "")
    if not isinstance(value, str):
        raise BadLine(f"'{name}' must be a string, got {json_type_name(value)}", f"'{name}' is not a string")
    return value


def _append_answer(row: Row, answer: str) -> Row | None:
    return append_text(row, "instruction", "output", answer)


ALPACA = RowForm(
    name="Alpaca",
    keys=("instruction", "output"),
    read=_read,
    append_answer=_append_answer,
    example={"instruction": "2 + 2?", "input": "", "output": "4"},
    optional=("input", "history"),
)
