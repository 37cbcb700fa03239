"""Conversations shown token by token, with the model's probability of each supervised token."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

SHADES = 10
"""Number of background colors, for equal parts of [0, 1]."""
PART_TITLE = "part of the next character"


@dataclass(frozen=True)
class TextPiece:
    """Part of the text of a token.

    Attributes:
        kind: "text"; "space", "tab" or "control" for characters that would be invisible; "part" for a token
            that is only part of a character and has no text.
        text: the text to show.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Token:
    """A supervised token, a token that ends a turn, or a run of other tokens.

    Attributes:
        lines: its text in lines and pieces; all lines but the last end with a newline.
        p: its probability; None if it is not supervised.
        before: its probability in the first evaluation; None if that is not recorded.
        end: whether it ends a turn.
    """

    lines: list[list[TextPiece]]
    p: float | None = None
    before: float | None = None
    end: bool = False

    @property
    def percent(self) -> str:
        """The probability in percent, rounded down, so that 100 means certainty; "?" for NaN."""
        return "?" if self.p is None or math.isnan(self.p) else str(int(100 * self.p))

    @property
    def shade(self) -> int:
        """Index of the background color, from 0 to SHADES - 1."""
        return 0 if self.p is None or math.isnan(self.p) else min(int(SHADES * self.p), SHADES - 1)

    @property
    def title(self) -> str:
        """Text of the tooltip."""
        text = f"p {self.p:.4g}"
        if self.before is not None:
            text += f", before {self.before:.4g}"
        return text + (", ends the turn" if self.end else "")


@dataclass(frozen=True)
class Reading:
    """The tokens of a conversation with their probabilities at one step.

    Attributes:
        step: optimizer step of the evaluation.
        tokens: all tokens.
        mean: mean probability of the supervised tokens; None without any.
    """

    step: int
    tokens: list[Token]
    mean: float | None


@dataclass(frozen=True)
class ConversationView:
    """A conversation of the evaluation data.

    Attributes:
        origin: its file and line.
        shortened: whether its first tokens are left out.
        readings: readings of the first and last evaluation, or of the only one.
    """

    origin: str
    shortened: bool
    readings: list[Reading]


def conversation_views(views: list[dict[str, Any]]) -> list[ConversationView]:
    """Return the conversations of the last evaluation, each with its reading in the first evaluation.

    Args:
        views: the scored conversations of the first and the last evaluation: `tokens` of a report.
    """
    if not views:
        return []
    first, last = views[0], views[-1]
    earlier = {} if first is last else {_key(scored): scored for scored in first["conversations"]}
    shown = []
    for number, scored in enumerate(last["conversations"], 1):
        before = earlier.get(_key(scored))
        readings = [] if before is None else [_reading(first["step"], before)]
        readings.append(_reading(last["step"], scored, before))
        origin = f"{scored['file']}:{scored['line']}" if scored["file"] else f"conversation {number}"
        shown.append(ConversationView(origin, scored.get("shortened", False), readings))
    return shown


def _key(scored: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key that identifies a conversation across evaluations: its origin and texts."""
    return (scored["file"], scored["line"], *(text for text, _, _ in scored["tokens"]))


def _reading(step: int, scored: dict[str, Any], before: dict[str, Any] | None = None) -> Reading:
    supervised = [p for _, p, _ in scored["tokens"] if p is not None]
    mean = float(np.mean(supervised)) if supervised else None
    return Reading(step, list(_tokens(scored, before)), mean)


def _tokens(scored: dict[str, Any], before: dict[str, Any] | None) -> Iterator[Token]:
    """Yield supervised and end-of-turn tokens one by one, and the tokens between them as one run."""
    earlier = [None] * len(scored["tokens"]) if before is None else [p for _, p, _ in before["tokens"]]
    pairs = zip(scored["tokens"], earlier, strict=True)
    for is_plain, group in groupby(pairs, key=lambda pair: pair[0][1] is None and not pair[0][2]):
        if is_plain:
            yield Token(lines_of("".join(text for (text, _, _), _ in group)))
            continue
        for (text, p, end), p_before in group:
            yield Token(lines_of(text) if text else [[TextPiece("part", PART_TITLE)]], p, p_before, end)


def lines_of(text: str) -> list[list[TextPiece]]:
    """Split text into lines and pieces, with white space and control characters as pieces of their own."""
    lines: list[list[TextPiece]] = [[]]
    for kind, letters in groupby(text, key=_kind):
        if kind == "text":
            lines[-1].append(TextPiece(kind, "".join(letters)))
            continue
        for letter in letters:
            if kind == "newline":
                lines.append([])
            else:
                shown = letter.encode("unicode_escape").decode() if kind == "control" else letter
                lines[-1].append(TextPiece(kind, shown))
    return lines


def _kind(letter: str) -> str:
    kind = {"\n": "newline", " ": "space", "\t": "tab"}.get(letter)
    return kind or ("text" if letter.isprintable() else "control")
