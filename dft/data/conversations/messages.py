"""Row form: `messages`, a list of turns with `role` and `content`, as in OpenAI's chat format."""

from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turn_styles import is_answer, read_conversation
from dft.data.conversations.turns import Row, Turn, append_answer


def _read(row: Row) -> list[Turn]:
    return read_conversation("messages", row["messages"])


def _append_answer(row: Row, answer: str) -> Row | None:
    return append_answer(row, "messages", answer, is_answer)


MESSAGES = RowForm(
    name="messages",
    keys=("messages",),
    read=_read,
    append_answer=_append_answer,
    example={"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    is_list=True,
)
