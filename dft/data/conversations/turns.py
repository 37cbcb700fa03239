"""Validate and normalize the turns of a conversation."""

import json
from typing import Any, NoReturn

from dft.data.conversations.faults import BadLine
from dft.strict_json import RepeatedKey, _kind, _short, refuse_repeated_keys

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may bring its reasoning; the first one that is there counts."""
BROKEN = "broken JSON"


def _refuse_constant(name: str) -> NoReturn:
    raise BadLine(f"{BROKEN}: {name} is not a JSON value", BROKEN)


DECODER = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys, parse_constant=_refuse_constant)


def _parse_json(raw: bytes) -> Any:
    try:
        return _decode(raw.decode())
    except UnicodeDecodeError as error:
        raise BadLine(f"not valid UTF-8 ({error.reason} at byte {error.start})", "not valid UTF-8") from None


def _decode(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except BadLine:
        raise
    except RepeatedKey as error:
        raise BadLine(f"{BROKEN}: {error}", BROKEN) from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise BadLine(f"{BROKEN}: {error.msg} ({line}column {error.colno})", BROKEN) from None
    except RecursionError:
        raise BadLine(f"{BROKEN}: nested too deeply", BROKEN) from None
    except ValueError:  # an integer beyond sys.get_int_max_str_digits()
        raise BadLine(f"{BROKEN}: a number of thousands of digits", BROKEN) from None


def _decode_inner(where: str, text: str) -> Any:
    """JSON within a string of the row."""
    try:
        return _decode(text)
    except BadLine as error:
        raise BadLine(f"{where}: {error}", f"{BROKEN} within a string") from None


def _turn(where: str, turn: Any, text_key: str = "content") -> tuple[dict[str, Any], bool]:
    """One clean message, and whether it is supervised. `text_key` is what the row calls its content."""
    if not isinstance(turn, dict):
        raise BadLine(
            f"{where} must be an object with 'role' and 'content', got {_kind(turn)}",
            "a turn that is no object",
        )
    if "role" not in turn:
        raise BadLine(f"{where}: no 'role'; the keys are {_short(sorted(turn))}", "no 'role'")
    # A template asks whether a key is defined, and null is.
    message = {key: value for key, value in turn.items() if value is not None}
    role = turn["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise BadLine(
            f"{where}: unknown role {_short(role)}; the roles are {', '.join(ROLES)}", "unknown role"
        )
    supervised = _supervision(where, role, message)
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str) and content.strip():
        return message, supervised  # as most turns are
    if "function_call" in message:  # OpenAI's name for it before there were tools
        message["tool_calls"] = [message.pop("function_call")]
    calls = "tool_calls" in message and _set_tool_calls(where, message)
    reasons = False
    for key in (*REASONING, "name"):
        if key in message:
            if not isinstance(message[key], str):
                raise BadLine(
                    f"{where}: '{key}' must be a string, got {_kind(message[key])}", f"'{key}' is no string"
                )
            reasons = reasons or (key != "name" and bool(message[key].strip()))
    speaks_otherwise = role == "assistant" and (calls or reasons)
    if isinstance(content, list):
        content = message["content"] = _joined_parts(where, text_key, content)
    if content is None and speaks_otherwise:
        message["content"] = ""  # templates index it
        return message, supervised
    if not isinstance(content, str):
        got = _kind(content) if "content" in turn else "nothing"
        raise BadLine(f"{where}: '{text_key}' must be a string, got {got}", f"'{text_key}' is no string")
    if role != "tool" and not speaks_otherwise and not content.strip():
        raise BadLine(f"{where}: empty {role} turn", "empty turn")
    return message, supervised


def _supervision(where: str, role: str, message: dict[str, Any]) -> bool:
    """Takes `train` and `weight` out of a message; whether it is supervised."""
    train, weight = message.pop("train", None), message.pop("weight", None)
    if train is None and weight is None:
        return role == "assistant"
    if train is not None and not isinstance(train, bool):
        raise BadLine(f"{where}: 'train' must be true or false, got {_short(train)}", "wrong 'train'")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadLine(f"{where}: 'weight' must be 0 or 1, got {_short(weight)}", "wrong 'weight'")
    if role != "assistant":
        # Some exporters write weight 1 on every turn; only `train` says that somebody meant it.
        if train:
            raise BadLine(
                f"{where}: 'train' is true on a {role} turn; only assistant turns are trained",
                "wrong 'train'",
            )
        return False
    if train is not None and weight is not None and train != bool(weight):
        raise BadLine(f"{where}: 'train' is {str(train).lower()} but 'weight' is {weight}", "wrong 'train'")
    return bool(weight) if train is None else train


def _joined_parts(where: str, text_key: str, parts: list[Any]) -> str:
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            named = isinstance(part, dict) and "type" in part
            got = f"one of type {_short(part['type'])}" if named else _kind(part)
            if named and part["type"] == "text":
                got = "one without text"
            raise BadLine(
                f"{where}: '{text_key}[{index}]' must be a part of text, got {got}", "a part that is no text"
            )
        texts.append(text)
    return "".join(texts)


def _set_tool_calls(where: str, message: dict[str, Any]) -> bool:
    """Puts the calls of a message into one form; whether there are any."""
    calls = message["tool_calls"]
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadLine(
            f"{where}: 'tool_calls' must be a list of objects, got {_kind(calls)}", "'tool_calls' is no list"
        )
    if calls:
        message["tool_calls"] = [
            _tool_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)
        ]
    else:  # some templates take the key alone for a call
        del message["tool_calls"]
    return bool(calls)


def _tool_call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    """A call as templates expect it: `{"type": "function", "function": {"name", "arguments": {...}}}`."""
    call = {key: value for key, value in call.items() if value is not None}
    if "function" not in call:
        bare = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        call = {"type": "function", **call, "function": bare}
    function = call["function"]
    if not isinstance(function, dict):
        raise BadLine(f"{where}: 'function' must be an object, got {_kind(function)}", "wrong 'tool_calls'")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        got = "an empty string" if isinstance(name, str) else _kind(name) if name is not None else "nothing"
        raise BadLine(f"{where}: 'name' must be the name of a function, got {got}", "wrong 'tool_calls'")
    if isinstance(arguments, str):
        arguments = _decode_inner(f"{where}: 'arguments'", arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadLine(
            f"{where}: 'arguments' must be an object or a JSON string of one, got {_kind(arguments)}",
            "wrong 'tool_calls'",
        )
    return {**call, "function": {**function, "arguments": arguments}}
