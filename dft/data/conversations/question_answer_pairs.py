"""Row form: `conversation`, a list of objects with the two texts `human` and `assistant`."""

from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turn_styles import is_answer, read_conversation
from dft.data.conversations.turns import Row, Turn, append_answer


def _read(row: Row) -> list[Turn]:
    return read_conversation("conversation", row["conversation"], is_sharegpt=True)


def _append_answer(row: Row, answer: str) -> Row | None:
    turns = row.get("conversation")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and "human" in turns[-1]:
        if turns[-1].get("assistant") is not None:
            return row
        return {**row, "conversation": [*turns[:-1], {**turns[-1], "assistant": answer}]}
    return append_answer(row, "conversation", answer, is_answer)


QUESTION_ANSWER_PAIRS = RowForm(
    name="human and assistant",
    keys=("conversation",),
    read=_read,
    append_answer=_append_answer,
    example={"conversation": [{"human": "2 + 2?", "assistant": "4"}]},
    is_list=True,
)
