"""Lists of turns in the styles that public data sets use, read into validated messages.

A turn is `role` and `content` (OpenAI), `from` and `value` (ShareGPT), or a pair of texts such as `human` and
`assistant`. Which of them it is follows from its keys alone.
"""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.parts import split_tool_results
from dft.data.conversations.row_json import parse_json_string, parse_list
from dft.data.conversations.turns import ROLES, Turn, read_turn
from dft.strict_json import json_type_name, shorten

CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose text is the JSON of one tool call or of a list of them."""
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "function"), "tool"),
    **dict.fromkeys(CALL_ROLES, "assistant"),
}
"""Role of a message by the name that public data sets use for it."""
PAIRS = {"human": "assistant", "user": "assistant", "input": "output"}
"""Key of the answer of a pair of texts, by the key of its question."""
TEXT_NAMES = frozenset([*PAIRS, *PAIRS.values(), *SHAREGPT_ROLES, "content", "value"])
"""Keys under which a turn of some style has a text."""
PAIR_SWITCH = "output_with_loss"
"""Key of a pair that says whether its answer is supervised, as in XTuner."""


def read_conversation(key: str, turns: Any, is_sharegpt: bool = False) -> list[Turn]:
    """Validate the list of turns under a key of a row.

    Args:
        key: the key, for error messages.
        turns: its value, a list or the JSON text of a list.
        is_sharegpt: whether error messages describe turns with `from` and `value`.

    Raises:
        BadLine: the value is not a list or is empty, or a turn is invalid.
    """
    turns = parse_list(f"'{key}'", turns)
    if not isinstance(turns, list) or not turns:
        raise BadLine(
            f"'{key}' must be a list of at least one turn, got {json_type_name(turns)}",
            f"'{key}' is not a list of turns",
        )
    messages: list[Turn] = []
    for index, raw in enumerate(turns):
        if _is_usual(raw):
            messages.append(read_turn(f"{key}[{index}]", raw))
            continue
        for turn in _split(f"{key}[{index}]", raw):
            message = _read_turn(f"{key}[{index}]", turn, is_sharegpt)
            if _role_name(turn) in CALL_ROLES and messages and _continues(messages[-1], message):
                messages[-1].message.setdefault("tool_calls", []).extend(message.message["tool_calls"])
            else:
                messages.append(message)
    return messages


def _is_usual(turn: Any) -> bool:
    """Return whether a turn has a role of a chat template and a text: the fast path."""
    return (
        type(turn) is dict
        and turn.get("role") in ROLES
        and type(turn.get("content")) is str
        and "from" not in turn
    )


def is_answer(turn: dict[str, Any]) -> bool:
    """Return whether a turn in any style, not validated, is an assistant turn."""
    name = _role_name(turn)
    if name is None:
        keys = _pair_keys(turn)
        return keys is not None and turn.get(keys[1]) is not None
    return isinstance(name, str) and SHAREGPT_ROLES.get(name) == "assistant"


def role_of(turn: dict[str, Any]) -> Any:
    """Return the role of a turn in any style, not validated; None for a pair of texts."""
    name = _role_name(turn)
    return SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else None


def _role_name(turn: Any) -> Any:
    return turn.get("from", turn.get("role")) if isinstance(turn, dict) else None


def _split(where: str, turn: Any) -> list[Any]:
    """Return the turns that an element of the list stands for: several for a pair or for tool results.

    Raises:
        BadLine: a pair has the keys of two pairs or of an unknown answer, or a tool result is misplaced.
    """
    if not isinstance(turn, dict) or type(turn.get("content")) is str:
        return [turn]
    keys = _pair_keys(turn)
    if keys is None:
        return split_tool_results(where, turn)
    question, answer = keys
    _check_pair(where, turn, question, answer)
    texts = {"system": turn.get("system"), "user": turn[question], "assistant": turn.get(answer)}
    others = {key: value for key, value in turn.items() if key not in (*keys, "system", PAIR_SWITCH)}
    if PAIR_SWITCH in turn:
        others["train"] = turn[PAIR_SWITCH]
    return [
        {"role": role, "content": text, **(others if role == "assistant" else {})}
        for role, text in texts.items()
        if text is not None
    ]


def _check_pair(where: str, turn: dict[str, Any], question: str, answer: str) -> None:
    """Check that a pair of texts has one question, and one answer unless it is only a question."""
    others = [
        key
        for key, value in turn.items()
        if value is not None
        and key not in (question, answer, "system")
        and (key in TEXT_NAMES or turn.get(answer) is None)
    ]
    if others:
        raise BadLine(
            f"{where}: '{others[0]}' beside '{question}'; a pair has '{question}' and '{answer}'",
            "a pair of texts with another key",
        )


def _pair_keys(turn: dict[str, Any]) -> tuple[str, str] | None:
    """Return the keys of the question and the answer, if a turn is a pair of texts."""
    if "from" in turn or "role" in turn:
        return None
    return next(((question, answer) for question, answer in PAIRS.items() if question in turn), None)


def _continues(previous: Turn, message: Turn) -> bool:
    """Return whether tool calls written as a separate turn belong to the assistant turn before them."""
    same = previous.is_supervised == message.is_supervised and previous.weight == message.weight
    return previous.message["role"] == "assistant" and same


def _read_turn(where: str, turn: Any, is_sharegpt: bool) -> Turn:
    if not isinstance(turn, dict):
        if not is_sharegpt:
            return read_turn(where, turn)
        raise BadLine(
            f"{where} must be an object with 'from' and 'value', got {json_type_name(turn)}",
            "a turn that is not an object",
        )
    role = turn.get("role")
    if "from" in turn:
        return _read_named_turn(where, turn, "from", "value")
    if is_sharegpt and role is None:
        raise BadLine(f"{where}: no 'from'; the keys are {shorten(sorted(turn))}", "no 'from'")
    if isinstance(role, str) and role in ROLES:
        return read_turn(where, turn)
    if is_sharegpt or (isinstance(role, str) and role in SHAREGPT_ROLES):
        return _read_named_turn(where, turn, "role", "content")
    return read_turn(where, turn)


def _read_named_turn(where: str, turn: dict[str, Any], role_key: str, text_key: str) -> Turn:
    """Validate a turn whose role may have one of the names of `SHAREGPT_ROLES`."""
    name = turn[role_key]
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        names = ", ".join(SHAREGPT_ROLES)
        raise BadLine(
            f"{where}: unknown {role_key} {shorten(name)}; it must be one of {names}", "unknown role"
        )
    _check_other_style(where, turn, role_key, text_key)
    message = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    message["role"] = SHAREGPT_ROLES[name]
    if text_key in turn:
        message["content"] = turn[text_key]
    if name in CALL_ROLES:
        message |= {"content": "", "tool_calls": _read_calls(where, text_key, name, message.get("content"))}
    return read_turn(where, message, text_key=text_key)


def _check_other_style(where: str, turn: dict[str, Any], role_key: str, text_key: str) -> None:
    """Check that a turn with the keys of both styles has the same role and the same text under both."""
    other_role, other_text = ("role", "content") if role_key == "from" else ("from", "value")
    role, text = turn.get(other_role), turn.get(other_text)
    if role is not None and SHAREGPT_ROLES.get(str(role)) != SHAREGPT_ROLES[turn[role_key]]:
        raise BadLine(f"{where}: '{role_key}' and '{other_role}' are different roles", "two roles in a turn")
    if text is not None and text != turn.get(text_key):
        raise BadLine(f"{where}: '{text_key}' and '{other_text}' are different texts", "two texts in a turn")


def _read_calls(where: str, text_key: str, name: str, calls: Any) -> Any:
    """Parse the tool calls in the text of a function_call turn; a single call becomes a list."""
    where = f"{where}: '{text_key}' of a {name}"
    if isinstance(calls, str):
        calls = parse_json_string(where, calls)
    if not calls:
        raise BadLine(f"{where} holds no call", f"a {name} without calls")
    return [calls] if isinstance(calls, dict) else calls
