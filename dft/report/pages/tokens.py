"""Conversations token by token, each target with the probability that the model gave to it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

SHADES = 10
"""Of p, equal parts of [0, 1]."""
BELONGS = "belongs to the next letter"


@dataclass(frozen=True)
class TextPiece:
    """A stretch of a token. `kind`: "text", or what would be invisible: "space", "tab", "control";
    "part" stands for a token without text of its own."""

    kind: str
    text: str


@dataclass(frozen=True)
class Token:
    """A target, or a stretch of unsupervised tokens.

    Attributes:
        lines: what it reads; all but the last end with a newline.
        p: probability of it; None where it is not supervised.
        before: the same, at the first evaluation; None where that is not known.
        end: whether it ends a turn.
    """

    lines: list[list[TextPiece]]
    p: float | None = None
    before: float | None = None
    end: bool = False

    @property
    def percent(self) -> str:
        """p in whole percent, rounded down: 100 is certainty."""
        return "?" if self.p is None or math.isnan(self.p) else str(int(100 * self.p))

    @property
    def shade(self) -> int:
        """From 0 to SHADES - 1."""
        return 0 if self.p is None or math.isnan(self.p) else min(int(SHADES * self.p), SHADES - 1)

    @property
    def title(self) -> str:
        told = f"p {self.p:.4g}"
        if self.before is not None:
            told += f", before {self.before:.4g}"
        return told + (", ends the turn" if self.end else "")


@dataclass(frozen=True)
class Reading:
    """A conversation under the model of one step."""

    step: int
    tokens: list[Token]
    mean: float | None


@dataclass(frozen=True)
class ConversationView:
    """One conversation of the evaluation.

    Attributes:
        place: its file and line.
        shortened: whether tokens in front were left out.
        readings: at the first evaluation and at the newest; one where there is no other.
    """

    place: str
    shortened: bool
    readings: list[Reading]


def conversations(views: list[dict[str, Any]]) -> list[ConversationView]:
    """The conversations of the newest evaluation, each beside itself at the first; of `report["tokens"]`."""
    if not views:
        return []
    first, newest = views[0], views[-1]
    earlier = {} if first is newest else {_key(one): one for one in first["conversations"]}
    made = []
    for number, one in enumerate(newest["conversations"], 1):
        old = earlier.get(_key(one))
        readings = [] if old is None else [_reading(first["step"], old)]
        readings.append(_reading(newest["step"], one, old))
        place = f"{one['file']}:{one['line']}" if one["file"] else f"conversation {number}"
        made.append(ConversationView(place, one.get("shortened", False), readings))
    return made


def _key(one: dict[str, Any]) -> tuple[Any, ...]:
    return (one["file"], one["line"], *(text for text, _, _ in one["tokens"]))


def _reading(step: int, one: dict[str, Any], old: dict[str, Any] | None = None) -> Reading:
    known = [p for _, p, _ in one["tokens"] if p is not None]
    return Reading(step, list(_tokens(one, old)), float(np.mean(known)) if known else None)


def _tokens(one: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Token]:
    """Targets one by one; what lies between them as one stretch, apart from tokens that end a turn."""
    ps = [None] * len(one["tokens"]) if old is None else [p for _, p, _ in old["tokens"]]
    pairs = zip(one["tokens"], ps, strict=True)
    for plain, group in groupby(pairs, key=lambda pair: pair[0][1] is None and not pair[0][2]):
        if plain:
            yield Token(lines_of("".join(text for (text, _, _), _ in group)))
            continue
        for (text, p, end), before in group:
            yield Token(lines_of(text) if text else [[TextPiece("part", BELONGS)]], p, before, end)


def lines_of(text: str) -> list[list[TextPiece]]:
    """Text in lines and pieces: white space and control characters apart, so that they can be shown."""
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
    known = {"\n": "newline", " ": "space", "\t": "tab"}.get(letter)
    return known or ("text" if letter.isprintable() else "control")
