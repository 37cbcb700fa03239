"""Helpers for chat messages as dicts."""

import json
import re
from collections.abc import Iterator
from typing import Any

from dft.data.conversations.turns import REASONING_KEYS

Message = dict[str, Any]
PLACEHOLDER = "Zq7Placeholder7qZ"
"""Replaces a text of a message to find out where, or whether, a template renders it.

It is searched from the end of a rendering, so it may occur in earlier messages.
"""


def as_parts(text: str) -> list[dict[str, str]]:
    """Return message content as a list with one text part."""
    return [{"type": "text", "text": text}]


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a JSON string."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def reasoning_field(message: Message) -> str | None:
    """Return the reasoning that a message stores under a separate key, or None if there is none."""
    return next((message[name] for name in REASONING_KEYS if message.get(name)), None)


def reasoning_of(message: Message) -> str:
    """Return the reasoning of a message, from its own key or from the content before </think>; "" if none."""
    before, closed, _ = message["content"].partition("</think>")
    return (reasoning_field(message) or (before.rpartition("<think>")[2] if closed else "")).strip()


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string inside a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def with_placeholders(message: Message, special: re.Pattern[str]) -> Message:
    """Return a message with `PLACEHOLDER` as its content and in place of strings that hold a special token.

    Everything else is kept, since templates check names and ids, and write separators only around existing
    parts.
    """
    replaced = {key: value if key == "role" else _replace(value, special) for key, value in message.items()}
    if message["content"].strip():
        replaced["content"] = PLACEHOLDER
    return replaced


def _replace(value: Any, special: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return PLACEHOLDER if special.search(value) else value
    if isinstance(value, dict):
        return {_replace(key, special): _replace(inner, special) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace(inner, special) for inner in value]
    return value
