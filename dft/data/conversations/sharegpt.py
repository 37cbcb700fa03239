"""Row form: `conversations`, a list of turns with `from` and `value`, as ShareGPT exports them."""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.row_json import parse_json_string
from dft.data.conversations.turns import ROLES, Row, Turn, append_answer, read_turn, read_turns
from dft.strict_json import json_type_name, shorten

SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    "function_call": "assistant",
}
"""Role of a message by the name that ShareGPT data sets use for it."""


def _read(row: Row) -> list[Turn]:
    return read_turns("conversations", row["conversations"], _read_turn)


def _read_turn(where: str, turn: Any) -> Turn:
    """Validate a turn with `from` and `value`, or with `role` and `content` and ShareGPT's role names."""
    if not isinstance(turn, dict):
        raise BadLine(
            f"{where} must be an object with 'from' and 'value', got {json_type_name(turn)}",
            "a turn that is not an object",
        )
    role_key, text_key = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    if role_key not in turn:
        raise BadLine(f"{where}: no 'from'; the keys are {shorten(sorted(turn))}", "no 'from'")
    name = turn[role_key]
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        names = ", ".join(SHAREGPT_ROLES)
        raise BadLine(
            f"{where}: unknown {role_key} {shorten(name)}; it must be one of {names}", "unknown role"
        )
    message = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    message["role"] = SHAREGPT_ROLES[name]
    if text_key in turn:
        message["content"] = turn[text_key]
    if name == "function_call":
        message |= {"content": "", "tool_calls": _read_calls(where, text_key, message.get("content"))}
    return read_turn(where, message, text_key=text_key)


def _read_calls(where: str, text_key: str, calls: Any) -> Any:
    """Parse the tool calls in the text of a function_call turn; a single call becomes a list."""
    where = f"{where}: '{text_key}' of a function_call"
    if isinstance(calls, str):
        calls = parse_json_string(where, calls)
    if not calls:
        raise BadLine(f"{where} holds no call", "a function_call without calls")
    return [calls] if isinstance(calls, dict) else calls


def _append_answer(row: Row, answer: str) -> Row | None:
    def is_answer(turn: dict[str, Any]) -> bool:
        role = turn.get("from", turn.get("role"))
        return isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant"

    return append_answer(row, "conversations", answer, is_answer)


SHAREGPT = RowForm(
    name="ShareGPT",
    keys=("conversations",),
    read=_read,
    append_answer=_append_answer,
    example={"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
)
