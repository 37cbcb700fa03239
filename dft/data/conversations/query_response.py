"""Row form: `query` and `response`, as in ms-swift, with earlier turns in `history`; or `response` alone."""

from dft.data.conversations.history import append_text, read_history, read_text
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turns import Row, Turn, read_turn


def _read(row: Row) -> list[Turn]:
    turns = read_history(row)
    if "query" in row:
        turns.append(read_turn("query", {"role": "user", "content": read_text(row, "query")}))
    return [*turns, read_turn("response", {"role": "assistant", "content": read_text(row, "response")})]


def _append_answer(row: Row, answer: str) -> Row | None:
    return append_text(row, "query", "response", answer)


QUERY_RESPONSE = RowForm(
    name="query and response",
    keys=("response",),
    read=_read,
    append_answer=_append_answer,
    example={"query": "2 + 2?", "response": "4"},
    optional=("query", "history"),
)
