"""Row form: `prompt` and `completion`, two texts or two lists of messages.

Only the completion is supervised.
"""

from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turn_styles import read_conversation
from dft.data.conversations.turns import Row, Turn, read_turn
from dft.strict_json import json_type_name


def _read(row: Row) -> list[Turn]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            read_turn("prompt", {"role": "user", "content": prompt}),
            read_turn("completion", {"role": "assistant", "content": completion}),
        ]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise BadLine(
            "'prompt' and 'completion' must both be strings or both be lists of turns, got "
            f"{json_type_name(prompt)} and {json_type_name(completion)}",
            "wrong 'prompt' and 'completion'",
        )
    context = [turn._replace(is_supervised=False) for turn in read_conversation("prompt", prompt)]
    turns = read_conversation("completion", completion)
    if not any(turn.message["role"] == "assistant" for turn in turns):
        raise BadLine(
            "no assistant turn in 'completion', so there is nothing to learn from", "no assistant turn"
        )
    return context + turns


def _append_answer(row: Row, answer: str) -> Row | None:
    if "prompt" not in row:
        return None
    if row.get("completion") is not None:
        return row
    is_text = isinstance(row["prompt"], str)
    return {**row, "completion": answer if is_text else [{"role": "assistant", "content": answer}]}


PROMPT_COMPLETION = RowForm(
    name="prompt and completion",
    keys=("prompt", "completion"),
    read=_read,
    append_answer=_append_answer,
    example={"prompt": "2 + 2?", "completion": "4"},
)
