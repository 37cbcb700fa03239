"""Helpers for chat messages as dicts."""

import json
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
