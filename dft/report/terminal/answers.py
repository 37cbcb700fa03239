"""How a chat prints generated text and the probability of each token."""

import math
import os
from collections.abc import Mapping
from enum import Enum
from typing import TextIO

from dft.evaluation.chat import Piece
from dft.report.terminal.samples import visible

KEPT = frozenset("\n\t\u200c\u200d")
"""Characters that are printed although `str.isprintable` is false. Escape sequences must not be printed."""
SHADES = ((0.1, "209"), (0.3, "216"), (0.6, "229"), (0.9, "153"))
"""Upper bounds of p with the color of the background (of 256), on which the text is black. More probable
tokens have no color. People with color vision deficiency can distinguish these colors."""
RESET = "\x1b[0m"


class Style(Enum):
    """How the probabilities of tokens are shown."""

    HIDDEN = "hidden"
    NUMBERS = "numbers"
    COLORS = "colors"


def probability_style(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Style:
    """Return `COLORS` for a terminal that has colors, and `NUMBERS` otherwise (https://no-color.org)."""
    has_colors = stream.isatty() and environment.get("TERM", "dumb") != "dumb"
    return Style.COLORS if has_colors and not environment.get("NO_COLOR") else Style.NUMBERS


def format_piece(piece: Piece, style: Style) -> str:
    """Return a piece of an answer as it is printed.

    The stop token is printed only with probabilities. If several tokens form one character, all of their
    probabilities are printed as numbers, and the lowest one as a color.
    """
    if style is Style.HIDDEN:
        return "" if piece.is_stop else printable(piece.text)
    text = printable(piece.text)
    body = text.rstrip("\n")
    breaks = text[len(body) :]
    if style is Style.NUMBERS:
        return f"{body}[{' '.join(map(format_p, piece.p))}]{breaks}"
    shade = shade_of(min(piece.p))
    if shade is None:
        return text
    # A line break would color the rest of the line, so it is drawn as a sign before it.
    marked = (body + "↵" * len(breaks)).replace("\n", "↵\n")
    lines = [f"\x1b[30;48;5;{shade}m{line}{RESET}" if line else "" for line in marked.split("\n")]
    return "\n".join(lines) + breaks


def shade_of(p: float) -> str | None:
    """Return the color of a probability, None if it has none."""
    return next((color for bound, color in SHADES if p < bound), None)


def format_p(p: float) -> str:
    """Return a probability with two decimals, rounded down, so that only 1 is 1.00."""
    return f"{math.floor(p * 100 + 1e-9) / 100:.2f}"  # 0.29 * 100 is below 29


def legend(style: Style) -> str:
    """Return a line that explains how probabilities are shown."""
    if style is Style.HIDDEN:
        return "p is not shown"
    start = "p of each token: the probability that the model gave it, before temperature and top_p"
    if style is Style.NUMBERS:
        return f"{start}, as [0.00] after it"
    shades = " ".join(f"\x1b[30;48;5;{color}m below {bound} {RESET}" for bound, color in SHADES)
    return f"{start}\n{shades} no color: {SHADES[-1][0]} or more"


def printable(text: str) -> str:
    """Return a text with escapes for characters that would move the cursor or be invisible."""
    return "".join(letter if letter in KEPT else visible(letter) for letter in text)
