"""Row form: `conversations`, a list of turns with `from` and `value`, as ShareGPT exports them."""

from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turn_styles import is_answer, read_conversation
from dft.data.conversations.turns import Row, Turn, append_answer


def _read(row: Row) -> list[Turn]:
    return read_conversation("conversations", row["conversations"], is_sharegpt=True)


def _append_answer(row: Row, answer: str) -> Row | None:
    return append_answer(row, "conversations", answer, is_answer)


SHAREGPT = RowForm(
    name="ShareGPT",
    keys=("conversations",),
    read=_read,
    append_answer=_append_answer,
    example={"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    is_list=True,
)
