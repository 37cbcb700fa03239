"""Formatting of numbers, arguments and names for the pages; the functions serve as template filters too."""

import json
import math
import re
from typing import Any

from markupsafe import Markup, escape

FLAG = re.compile(r"(?<![^\s(])(--[a-z][a-z_]*)")
SEPARATOR = re.compile(r"([_/])")


def format_number(value: float | int | None) -> str:
    """Format a number for a table: floats with four decimals, counts in full, an en dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    if 1e4 <= abs(value) < math.inf:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def format_argument(value: Any) -> str:
    """Return the value of a flag as text: strings unchanged, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def replace_unprintable(text: str) -> str:
    """Replace characters that a font cannot draw; file names may contain bytes that are not valid UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def mark_flags(text: str) -> Markup:
    """Return escaped text with each flag set as code, which keeps it on one line."""
    return Markup(FLAG.sub(r"<code>\1</code>", str(escape(text))))


def allow_breaks(name: str) -> Markup:
    """Return an escaped name that a browser may wrap after each `_` and `/`."""
    return Markup(SEPARATOR.sub(r"\1<wbr>", str(escape(name))))
