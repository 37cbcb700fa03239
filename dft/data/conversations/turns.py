"""Validation of turns, shared by all row forms."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from dft.data.conversations.faults import BadLine
from dft.data.conversations.parts import read_parts
from dft.data.conversations.row_json import parse_json_string
from dft.strict_json import json_type_name, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")
"""Roles of turns that count as absent if they are empty, as many data sets have them."""
SWITCHES = ("train", "loss")
"""Keys of a message that say whether it is supervised."""
WEIGHTS = ("weight", "loss_weight", "loss_scale")
"""Keys of a message with its weight in the loss."""
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""Range of weights besides 0. A larger or smaller number is hardly meant as a weight."""
ARGUMENT_KEYS = ("arguments", "parameters", "input")
"""Keys under which a tool call may hold its arguments."""
MEDIA = {
    f"{name}{suffix}": kind
    for name, kind in (("image", "an image"), ("video", "a video"), ("audio", "audio"))
    for suffix in ("s", "", "_path", "_paths", "_url", "_urls")
}
"""Kind of media by the key of a row or of a message that holds it."""
PARTIAL_KEYS = ("train_detail", "loss_mask")
"""Keys under which other trainers select parts of a message to train on."""
OTHER_SWITCHES = ("training", "trainable", "masked", "mask")
"""Keys under which other trainers say whether a message is supervised."""
LABELS = ("label", "labels", "kto_tag")
CORRECTNESS = ("is_correct", "correct")
REWARDS = ("reward", "rewards")
JUDGMENTS = (*LABELS, *CORRECTNESS, *REWARDS)
"""Columns, or keys of an assistant turn, that say how good an answer is."""
TOOL_KEYS = ("tools", "functions")
"""Columns with the definitions of tools. In a message, a template would hardly render them."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may hold its reasoning. The first one that is present is used."""

Row = dict[str, Any]
"""A parsed row of a data file."""


class Turn(NamedTuple):
    """A validated message.

    Attributes:
        message: an object with `role` and `content`.
        is_supervised: whether it is supervised.
        place: where the row has it ("messages[0]"), for error messages.
        weight: its weight in the loss, above 0.
        tools: the definitions of tools in its content, or None.
    """

    message: dict[str, Any]
    is_supervised: bool
    place: str
    weight: float = 1.0
    tools: Any = None


def append_answer(row: Row, key: str, answer: str, is_answer: Callable[[dict[str, Any]], bool]) -> Row | None:
    """Append an assistant turn to the list of turns under a key of a row.

    Args:
        row: the parsed row, not validated.
        key: the key of the list of turns.
        answer: the content of the new turn.
        is_answer: returns whether a turn is an assistant turn.

    Returns:
        The new row; the same row if it ends with an assistant turn; None if it has no turns under this key.
    """
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        return None
    if isinstance(turns[-1], dict) and is_answer(turns[-1]):
        return row
    return {**row, key: [*turns, {"role": "assistant", "content": answer}]}


def read_turn(where: str, turn: Any, text_key: str = "content") -> Turn:
    """Validate one turn with `role` and `content`, and normalize its tool calls and content parts.

    Args:
        where: location of the turn in the row, for error messages.
        turn: the value at that location.
        text_key: the key that the row itself uses for the content, for error messages.

    Returns:
        The turn, whose message has no null values, `SWITCHES` and `WEIGHTS`. The content of an empty system
        or developer turn is "", see `without_empty_system_turns`.

    Raises:
        BadLine: a wrong type, an unknown role or an empty turn.
    """
    if not isinstance(turn, dict):
        raise BadLine(
            f"{where} must be an object with 'role' and 'content', got {json_type_name(turn)}",
            "a turn that is not an object",
        )
    if "role" not in turn:
        raise BadLine(f"{where}: no 'role'; the keys are {shorten(sorted(turn))}", "no 'role'")
    # A template tests whether a key is defined, and a null value counts as defined.
    message = {key: value for key, value in turn.items() if value is not None}
    role = turn["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise BadLine(
            f"{where}: unknown role {shorten(role)}; the roles are {', '.join(ROLES)}", "unknown role"
        )
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str) and content.strip():
        return Turn(message, role == "assistant", where)  # fast path: most turns have no other keys
    _check_meanings(where, message)
    weight = _pop_weight(where, role, message)
    _rename_function_call(where, message)
    tools = None
    if isinstance(content, list):
        tools = read_parts(where, text_key, message)
        content = message["content"]
    has_calls = "tool_calls" in message and _normalize_tool_calls(where, message)
    has_reasoning = _has_reasoning(where, message)
    may_be_empty = role == "assistant" and (has_calls or has_reasoning)
    if content is None and (may_be_empty or (role in SYSTEM_ROLES and "content" in turn)):
        content = message["content"] = ""  # templates read it unconditionally
    if not isinstance(content, str):
        got = json_type_name(content) if "content" in turn else "nothing"
        raise BadLine(f"{where}: '{text_key}' must be a string, got {got}", f"'{text_key}' is not a string")
    if role != "tool" and not may_be_empty and not content.strip():
        if role not in SYSTEM_ROLES:
            raise BadLine(f"{where}: empty {role} turn", "empty turn")
        if others := [key for key, value in message.items() if value and key not in ("role", "content")]:
            raise BadLine(f"{where}: empty {role} turn with {shorten(sorted(others))}", "empty turn")
        message["content"] = ""
    return Turn(message, weight > 0, where, weight or 1.0, tools)


def without_empty_system_turns(turns: list[Turn]) -> list[Turn]:
    """Return validated turns without the system and developer turns that are empty."""
    return [turn for turn in turns if turn.message["content"] or turn.message["role"] not in SYSTEM_ROLES]


def _check_meanings(where: str, message: dict[str, Any]) -> None:
    """Raise `BadLine` if a key of a message says that it is more, or less, than its text."""
    for key, value in message.items():
        if key in MEDIA and value:
            raise BadLine(
                f"{where}: '{key}' holds {MEDIA[key]}, and this trainer reads only text; --on_bad_data skip "
                "leaves such rows out",
                "images, videos or audio",
            )
        if key in PARTIAL_KEYS:
            raise BadLine(
                f"{where}: '{key}' selects parts of a message, but only whole messages can be selected, "
                f"with 'train'",
                "a part of a message",
            )
        if key in OTHER_SWITCHES:
            raise BadLine(
                f"{where}: '{key}' is {shorten(value)}; this trainer reads 'train', true or false, "
                "which says whether a turn is trained",
                f"'{key}' of a message",
            )
        if key in TOOL_KEYS and value:
            raise BadLine(
                f"{where}: '{key}' stands in a message; make it a column of the row",
                f"'{key}' of a message",
            )
        if key in JUDGMENTS and message["role"] == "assistant" and value is not True:
            raise BadLine(
                f"{where}: '{key}' is {shorten(value)}: it says how good an answer is, and this trainer "
                'learns every answer; remove it, or write "train": false in this turn',
                "an answer that is judged",
            )
        if key == "value" and value != message.get("content"):
            raise BadLine(f"{where}: 'content' and 'value' are different texts", "two texts in a turn")


def _rename_function_call(where: str, message: dict[str, Any]) -> None:
    """Replace the key that OpenAI's format used before `tool_calls`."""
    if "function_call" not in message:
        return
    if message.get("tool_calls"):
        raise BadLine(f"{where}: a call in 'function_call' and in 'tool_calls'", "wrong 'tool_calls'")
    message["tool_calls"] = [message.pop("function_call")]


def _has_reasoning(where: str, message: dict[str, Any]) -> bool:
    """Return whether a message has any reasoning.

    Raises:
        BadLine: its reasoning or its name is not a string.
    """
    has_reasoning = False
    for key in (*REASONING_KEYS, "name"):
        if key in message:
            if not isinstance(message[key], str):
                raise BadLine(
                    f"{where}: '{key}' must be a string, got {json_type_name(message[key])}",
                    f"'{key}' is not a string",
                )
            has_reasoning = has_reasoning or (key != "name" and bool(message[key].strip()))
    return has_reasoning


def _pop_weight(where: str, role: str, message: dict[str, Any]) -> float:
    """Remove the keys about the supervision of a message. Return its weight, 0 if it is not supervised."""
    switches = {key: message.pop(key) for key in SWITCHES if key in message}
    weights = {key: message.pop(key) for key in WEIGHTS if key in message}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise BadLine(f"{where}: '{key}' must be true or false, got {shorten(value)}", f"wrong '{key}'")
        # Some exporters write weight 1 on every turn. A switch, in contrast, is always set deliberately.
        if value and role != "assistant":
            raise BadLine(
                f"{where}: '{key}' is true on a {role} turn; only assistant turns are trained",
                f"wrong '{key}'",
            )
    for key, value in weights.items():
        check_weight(f"{where}: '{key}'", key, value)
    if role != "assistant":
        return 0
    values = {**switches, **weights}
    if len({bool(value) for value in values.values()}) > 1 or len({*weights.values()}) > 1:
        texts = [f"'{key}' is {json.dumps(value)}" for key, value in values.items()]
        raise BadLine(f"{where}: {' but '.join(texts)}", f"wrong '{next(iter(values))}'")
    return float(next(iter(weights.values()), all(switches.values())))


def check_weight(where: str, key: str, value: Any) -> None:
    """Raise `BadLine` unless a value is a weight: 0, or a number from `MIN_WEIGHT` to `MAX_WEIGHT`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT):
        raise BadLine(
            f"{where} must be a weight: 0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:,.0f}, got "
            f"{shorten(value)}",
            f"wrong '{key}'",
        )


def _normalize_tool_calls(where: str, message: dict[str, Any]) -> bool:
    """Normalize the tool calls of a message. Return whether there are any."""
    calls = message["tool_calls"]
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadLine(
            f"{where}: 'tool_calls' must be a list of objects, got {json_type_name(calls)}",
            "'tool_calls' is not a list",
        )
    if calls:
        message["tool_calls"] = [
            _normalize_tool_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)
        ]
    else:  # some templates render a call as soon as the key is defined
        del message["tool_calls"]
    return bool(calls)


def _normalize_tool_call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    """Return a call as templates expect it: `{"type": "function", "function": {"name", "arguments": {}}}`."""
    call = {key: value for key, value in call.items() if value is not None}
    if "function" not in call:
        bare = {key: call.pop(key) for key in ("name", *ARGUMENT_KEYS) if key in call}
        call = {"type": "function", **call, "function": bare}
    function = call["function"]
    if not isinstance(function, dict):
        raise BadLine(
            f"{where}: 'function' must be an object, got {json_type_name(function)}", "wrong 'tool_calls'"
        )
    name = function.get("name")
    argument_keys = [key for key in ARGUMENT_KEYS if key in function]
    if len(argument_keys) > 1:
        names = " and in ".join(f"'{key}'" for key in argument_keys)
        raise BadLine(f"{where}: arguments in {names}", "wrong 'tool_calls'")
    argument_key = argument_keys[0] if argument_keys else "arguments"
    arguments = function.get(argument_key)
    if not isinstance(name, str) or not name.strip():
        got = "nothing" if name is None else json_type_name(name)
        got = "an empty string" if isinstance(name, str) else got
        raise BadLine(f"{where}: 'name' must be the name of a function, got {got}", "wrong 'tool_calls'")
    if isinstance(arguments, str):
        arguments = parse_json_string(f"{where}: '{argument_key}'", arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadLine(
            f"{where}: '{argument_key}' must be an object or a JSON string of an object, got "
            f"{json_type_name(arguments)}",
            "wrong 'tool_calls'",
        )
    others = {key: value for key, value in function.items() if key != argument_key}
    return {**call, "function": {**others, "arguments": arguments}}
