"""JSON text -> a validated conversation. Every refusal gives its reason; file and line are the caller's."""

import json
import re
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.turns import ROLES, _decode_inner, _parse_json, _turn
from dft.strict_json import _kind, _short

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
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

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
