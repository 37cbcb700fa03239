"""JSON parsing that rejects repeated keys, and descriptions of JSON values for error messages."""

from collections import Counter
from typing import Any

MAX_SHOWN = 80
"""Longest representation of a value in an error message, in characters."""


class RepeatedKey(ValueError):
    """Raised when a JSON object repeats a key. Parsers would silently use the last value."""


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; an `object_pairs_hook` for `json`.

    Raises:
        RepeatedKey: a key appears twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKey(f"the key {shorten(repeated)} appears twice in one object")
    return values


def json_type_name(value: Any) -> str:
    """Return the JSON type of a parsed value, with its article: "an object", "a list", "null"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")


def shorten(value: Any) -> str:
    """Return the representation of a value, truncated to `MAX_SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
