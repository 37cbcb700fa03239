"""Row form: `instruction`, `input` and `output`, as in the Alpaca data, with earlier turns in `history`."""

from dft.data.conversations.history import append_text, read_history, read_text
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turns import Row, Turn, read_turn


def _read(row: Row) -> list[Turn]:
    texts = [read_text(row, name) for name in ("instruction", "input")]
    question = "\n".join(text for text in texts if text.strip())
    return [
        *read_history(row),
        read_turn("instruction", {"role": "user", "content": question}),
        read_turn("output", {"role": "assistant", "content": read_text(row, "output")}),
    ]


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
