"""Message content that is a list of parts: text, reasoning, tool calls and tool results.

Three styles are read: OpenAI's `{"type": "text", "text": ...}`, parts with a `value`, and the content blocks
of Anthropic's Messages API (`thinking`, `tool_use`, `tool_result`).
"""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_json import parse_json_string
from dft.strict_json import json_type_name, shorten

REASONING_TYPES = {"reasoning": ("value", "text", "reasoning"), "thinking": ("thinking", "value", "text")}
"""Keys that hold the text of a reasoning part, by its type. The first one that is present is used."""
CALL_TYPES = ("tool_call", "tool_use")
RESULT_KEYS = ("type", "content", "tool_use_id", "cache_control")
"""Keys of a `tool_result` block that are read, or that mean nothing to a template."""
ORDER = ("reasoning", "text", "call")
"""Order in which chat templates write the parts of a turn."""


def read_parts(where: str, text_key: str, message: dict[str, Any]) -> Any:
    """Replace the content parts of a message by its text, and add its reasoning and its tool calls.

    Args:
        where: location of the message in the row, for error messages.
        text_key: the key that the row itself uses for the content, for error messages.
        message: the message, whose `content` is a list of parts.

    Returns:
        The value of its part of type `tools`, or None.

    Raises:
        BadLine: a part is invalid, stands where a chat template would not write it, or repeats a key of the
            message.
    """
    texts: dict[str, list[Any]] = {kind: [] for kind in ORDER}
    last, is_assistant, tools = 0, message["role"] == "assistant", None
    for index, part in enumerate(message["content"]):
        place = f"{where}: '{text_key}[{index}]'"
        kind, value = _read_part(place, part, is_assistant)
        if kind is None:
            if tools is not None:
                raise BadLine(f"{place}: a second part of type 'tools'", "tools are defined twice")
            tools = value
            continue
        if value == "":
            continue
        if ORDER.index(kind) < last:
            raise BadLine(
                f"{place}: {_noun(kind)} after {_noun(ORDER[last])}, but a chat template writes the "
                "reasoning of a turn first, then its text, then its tool calls",
                "parts in another order than the chat template writes them",
            )
        last = ORDER.index(kind)
        texts[kind].append(value)
    message["content"] = "".join(texts["text"])
    for key, kind, value in (
        ("reasoning_content", "reasoning", "".join(texts["reasoning"])),
        ("tool_calls", "call", texts["call"]),
    ):
        if not value:
            continue
        if message.get(key):
            raise BadLine(f"{where}: {_noun(kind)} in '{text_key}' and in '{key}'", f"'{key}' is given twice")
        message[key] = value
    return tools


def _noun(kind: str) -> str:
    return {"reasoning": "reasoning", "text": "text", "call": "a tool call"}[kind]


def _read_part(place: str, part: Any, is_assistant: bool) -> tuple[str | None, Any]:
    """Return what a part is, one of `ORDER`, and its text or call; None and its value for tools."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = part["value"] if part.get("text") is None and "value" in part else part.get("text")
        if not isinstance(text, str):
            raise BadLine(f"{place} must be a text part, got a part without text", "a part that is not text")
        return "text", text
    if kind == "tools":
        return None, part.get("value")
    if is_assistant and kind in REASONING_TYPES:
        text = next((part[key] for key in REASONING_TYPES[kind] if key in part), None)
        if not isinstance(text, str):
            raise BadLine(f"{place} must be a {kind} part, got one without text", "a part without text")
        return "reasoning", text
    if is_assistant and kind in CALL_TYPES:
        return "call", _read_call(place, kind, part)
    got = f"a part of type {shorten(kind)}" if kind is not None else json_type_name(part)
    raise BadLine(f"{place} must be a text part, got {got}", "a part that is not text")


def _read_call(place: str, kind: str, part: dict[str, Any]) -> dict[str, Any]:
    """Return the tool call of a part; its name and arguments are checked with those of other messages."""
    if kind == "tool_call" and "value" in part:
        call = part["value"]
        if isinstance(call, str):
            call = parse_json_string(place, call)
        if not isinstance(call, dict):
            raise BadLine(
                f"{place}: the value of a tool_call must be an object, got {json_type_name(call)}",
                "wrong 'tool_calls'",
            )
        return call
    return {key: value for key, value in part.items() if key not in ("type", "cache_control")}


def split_tool_results(where: str, turn: Any) -> list[Any]:
    """Return a turn with `tool_result` blocks as several: a tool turn for each, and one for other parts.

    In Anthropic's format the results of tools are blocks of the next user turn, in front of its text.

    Raises:
        BadLine: the blocks are in another turn, or behind its text.
    """
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list) or not any(_is_result(part) for part in content):
        return [turn]
    count = sum(map(_is_result, content))
    if turn.get("from", turn.get("role")) not in ("user", "human", "tool"):
        raise BadLine(f"{where}: a tool_result outside of a user turn", "a tool_result in a wrong place")
    if not all(map(_is_result, content[:count])):
        raise BadLine(
            f"{where}: a tool_result behind other parts; results are read as turns of their own in front of "
            "the text",
            "a tool_result in a wrong place",
        )
    turns: list[Any] = []
    others = content[count:]
    for block in content[:count]:
        extra = {key: value for key, value in block.items() if key not in RESULT_KEYS}
        result = {"role": "tool", "content": block.get("content") or "", **extra}
        if "tool_use_id" in block:
            result["tool_call_id"] = block["tool_use_id"]
        turns.append(result)
    return [*turns, {**turn, "content": others}] if others else turns


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "tool_result"
