"""JSON parsing that rejects repeated keys."""

from collections import Counter
from typing import Any


class RepeatedKey(ValueError):
    """An object has one key twice, of which JSON parsers silently take the last."""


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json` that raises `RepeatedKey`."""
    made = dict(pairs)
    if len(made) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKey(f"the key {_short(repeated)} appears twice in one object")
    return made


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
