"""JSON text -> a validated conversation. Every refusal gives its reason; file and line are the caller's."""

import json
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from dft.data.faults import BadLine

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    "function_call": "assistant",
}
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "tools", "system", "chat_template_kwargs",
)  # fmt: skip
"""Names of all top-level keys that are understood."""
FORMS = "'messages', 'conversations' or 'prompt' with 'completion'"
RESERVED = ("messages", "tools", "add_generation_prompt")
"""What a template gets of every conversation, and no variable may replace."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may bring its reasoning; the first one that is there counts."""
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
BROKEN = "broken JSON"

Turns = list[tuple[dict[str, Any], bool]]
"""Clean messages, each with whether it is supervised."""


@dataclass(frozen=True)
class Conversation:
    """One conversation, checked.

    Attributes:
        messages: each with `role` and `content`, a string ("" where a turn only calls tools or only reasons);
            with `tool_calls`, `reasoning_content`, `name` and whatever other keys the row had; without nulls.
        trained: for each message whether it is supervised; only turns of the assistant can be.
        tools: what the template is told of tools, None without any.
        variables: further variables for the template, the row's `chat_template_kwargs`.
    """

    messages: list[dict[str, Any]]
    trained: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def last_turn_only(self) -> "Conversation":
        """The same conversation with no turn supervised but the last of those that are."""
        last = max(index for index, trained in enumerate(self.trained) if trained)
        return replace(self, trained=tuple(index == last for index in range(len(self.trained))))


def has_form(keys: Container[str]) -> bool:
    """Whether these keys (a dict, a list of columns) are enough for one of the accepted forms."""
    return "messages" in keys or "conversations" in keys or ("prompt" in keys and "completion" in keys)


def parse_conversation(text: bytes) -> Conversation:
    """The conversation that a JSON object holds, in one of three forms: see `FORMS`.

    Columns that are null count as absent; columns not in `COLUMNS` are passed over.

    Raises:
        BadLine: broken JSON, wrong types, an unknown form, role or part of a message, an empty turn, or
            nothing to supervise.
    """
    row = _parse_json(text)
    if not isinstance(row, dict):
        raise BadLine(f"expected a JSON object with {FORMS}, got {_kind(row)}", "not a JSON object")
    turns = _turns({key: value for key, value in row.items() if value is not None})
    system = row.get("system")
    if system is not None:
        turns = _with_system(system, turns)
    if not any(message["role"] == "assistant" for message, _ in turns):
        raise BadLine("no assistant turn, so there is nothing to learn from", "no assistant turn")
    trained = tuple(supervised for _, supervised in turns)
    if True not in trained:
        raise BadLine("no assistant turn is trained: all have train false or weight 0", "nothing is trained")
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise BadLine(
            f"'chat_template_kwargs' must be an object, got {_kind(variables)}",
            "wrong 'chat_template_kwargs'",
        )
    for name in RESERVED:
        if variables and name in variables:
            raise BadLine(
                f"'chat_template_kwargs' must not hold {name!r}, which is made from the row",
                "wrong 'chat_template_kwargs'",
            )
    messages = [message for message, _ in turns]
    made = Conversation(messages, trained, _tools(tools) if tools else None, variables or {})
    # Only an escape can smuggle half a surrogate pair into text that was valid UTF-8.
    if SURROGATE_ESCAPE.search(text):
        _check_surrogates(made)
    return made


# ---- JSON ----


def _refuse_constant(name: str) -> NoReturn:
    raise BadLine(f"{BROKEN}: {name} is not a JSON value", BROKEN)


class RepeatedKey(ValueError):
    """An object has one key twice, of which JSON parsers silently take the last."""


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json` that raises `RepeatedKey`."""
    made = dict(pairs)
    if len(made) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKey(f"the key {_short(repeated)} appears twice in one object")
    return made


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


def _check_surrogates(made: Conversation) -> None:
    parts = {f"messages[{index}]": message for index, message in enumerate(made.messages)}
    for where, part in {**parts, "'tools'": made.tools, "'chat_template_kwargs'": made.variables}.items():
        try:
            json.dumps(part, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadLine(
                f"{where}: holds half a surrogate pair (\\ud800 to \\udfff), which is no character",
                "half a surrogate pair",
            ) from None


# ---- forms ----


def _turns(row: dict[str, Any]) -> Turns:
    """The turns of a row without null columns."""
    if "messages" in row:
        messages = _list_of_turns("messages", row["messages"])
        return [_turn(f"messages[{index}]", message) for index, message in enumerate(messages)]
    if "conversations" in row:
        messages = _list_of_turns("conversations", row["conversations"])
        return [_sharegpt_turn(f"conversations[{index}]", message) for index, message in enumerate(messages)]
    if has_form(row):
        return _prompt_and_completion(row["prompt"], row["completion"])
    keys = f"the keys are {_short(sorted(row))}" if row else "the object is empty"
    raise BadLine(f"no conversation; {keys}, expected {FORMS}", "no conversation")


def _list_of_turns(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadLine(
            f"'{key}' must be a list of at least one turn, got {_kind(value)}", f"'{key}' is no list of turns"
        )
    return value


def _prompt_and_completion(prompt: Any, completion: Any) -> Turns:
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            _turn("prompt", {"role": "user", "content": prompt}),
            _turn("completion", {"role": "assistant", "content": completion}),
        ]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise BadLine(
            "'prompt' and 'completion' must both be strings or both be lists of turns, got "
            f"{_kind(prompt)} and {_kind(completion)}",
            "wrong 'prompt' and 'completion'",
        )
    given = [_turn(f"prompt[{i}]", turn) for i, turn in enumerate(_list_of_turns("prompt", prompt))]
    learned = [
        _turn(f"completion[{i}]", turn) for i, turn in enumerate(_list_of_turns("completion", completion))
    ]
    if not any(message["role"] == "assistant" for message, _ in learned):
        raise BadLine(
            "no assistant turn in 'completion', so there is nothing to learn from", "no assistant turn"
        )
    return [(message, False) for message, _ in given] + learned


def _sharegpt_turn(where: str, turn: Any) -> tuple[dict[str, Any], bool]:
    """A turn of `from` and `value`, or of `role` and `content` with ShareGPT's names for the roles."""
    if not isinstance(turn, dict):
        raise BadLine(
            f"{where} must be an object with 'from' and 'value', got {_kind(turn)}",
            "a turn that is no object",
        )
    who, what = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    if who not in turn:
        raise BadLine(f"{where}: no 'from'; the keys are {_short(sorted(turn))}", "no 'from'")
    name = turn[who]
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise BadLine(f"{where}: unknown {who} {_short(name)}; it must be one of {known}", "unknown role")
    renamed = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    renamed["role"] = SHAREGPT_ROLES[name]
    if what in turn:
        renamed["content"] = turn[what]
    if name == "function_call":
        told = f"{where}: '{what}' of a function_call"
        calls = renamed.get("content")
        calls = _decode_inner(told, calls) if isinstance(calls, str) else calls
        if not calls:
            raise BadLine(f"{told} holds no call", "a function_call without calls")
        renamed |= {"content": "", "tool_calls": [calls] if isinstance(calls, dict) else calls}
    return _turn(where, renamed, text_key=what)


def _with_system(system: Any, turns: Turns) -> Turns:
    if not isinstance(system, str):
        raise BadLine(f"'system' must be a string, got {_kind(system)}", "'system' is no string")
    if not system.strip() or any(message["role"] in ("system", "developer") for message, _ in turns):
        return turns
    return [({"role": "system", "content": system}, False), *turns]


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = _decode_inner("'tools'", tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadLine(
            f"'tools' must be a list of objects or a JSON string of one, got {_kind(tools)}", "wrong 'tools'"
        )
    return tools or None


# ---- turns ----


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


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
