"""Detect whether a text file is a JSON array, JSON Lines or a single JSON object."""

import json
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

from dft.data.conversations.forms import matching_forms
from dft.data.reading.json_array import BLANKS, ArrayScanner
from dft.data.reading.records import BOM, MAX_RECORD_BYTES

LOOKAHEAD = 4 << 20
"""Bytes to read ahead, at most, to see a whole line or a whole file."""
NOT_JSON = object()


class TextFormat(Enum):
    """Layout of the records in a text file."""

    ARRAY = auto()
    LINES = auto()
    OBJECT = auto()


def detect_format(kind: str, pieces: Iterator[bytes]) -> tuple[TextFormat, Iterator[bytes]]:
    """Detect the format of a file by its beginning.

    A file whose first character is "[" is an array, except a `.jsonl` file whose first line is a complete
    array followed by other lines. Other files are JSON Lines, except a `.json` file whose first line is not a
    complete value and none of whose other lines is a conversation; such a file is a single object that spans
    several lines.

    Args:
        kind: "jsonl" or "json", from the suffix of the file.
        pieces: the bytes of the file.

    Returns:
        The format, and all the bytes of the file, including those that were read ahead.
    """
    head: list[bytes] = []
    opening = b""
    for piece in pieces:
        opening = (piece if head else piece.removeprefix(BOM)).lstrip(BLANKS)
        head.append(piece)
        if opening:
            break
    return _detect(kind, opening, head, pieces), _chain(head, pieces)


def _detect(kind: str, opening: bytes, head: list[bytes], pieces: Iterator[bytes]) -> TextFormat:
    """Detect the format, given the pieces read so far (`head`) and the first text in them (`opening`)."""
    if opening.startswith(b"["):
        lines = kind == "jsonl" and _has_lines_of_arrays(head, pieces)
    else:
        lines = (
            kind == "jsonl"
            or not opening
            or _is_first_line_whole(opening, head, pieces)
            or _has_conversation_line(head, pieces)
        )
    if lines:
        return TextFormat.LINES
    return TextFormat.ARRAY if opening.startswith(b"[") else TextFormat.OBJECT


# The functions below that read ahead append what they read to `head`.


def _has_lines_of_arrays(head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Return whether the first line is a complete array and is followed by other lines."""
    start = b"".join(head).removeprefix(BOM).lstrip(BLANKS)
    while len(start) < LOOKAHEAD and not start.partition(b"\n")[2].strip():
        piece = next(pieces, b"")
        if not piece:
            break
        head.append(piece)
        start += piece
    first, _, others = start.partition(b"\n")
    return bool(others.strip()) and _parse(first) is not NOT_JSON


def _is_first_line_whole(opening: bytes, head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Return whether brackets and quotes are balanced in the line that begins with `opening`.

    A line that is balanced but not valid JSON still counts as a line, so that its error is reported and the
    other lines are read.
    """
    scanner, text, size = ArrayScanner(), opening, 0
    while size <= MAX_RECORD_BYTES:
        line, end, _ = text.partition(b"\n")
        scanner.scan(line)
        text = b"" if end else next(pieces, b"")
        if not text:
            break
        head.append(text)
        size += len(text)
    return scanner.depth == 0 and not scanner.in_string


def _has_conversation_line(head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Return whether the file is JSON Lines with a truncated first line, not an object over several lines.

    True if another line is a conversation and the whole text is not one JSON value.
    """
    limit, size = LOOKAHEAD, 0
    while size <= limit and (piece := next(pieces, b"")):
        head.append(piece)
        size += len(piece)
    text = b"".join(head).removeprefix(BOM).lstrip(BLANKS)
    if size <= limit and _parse(text) is not NOT_JSON:
        return False
    return any(_is_conversation(line) for line in text.split(b"\n")[1:])


def _is_conversation(text: bytes) -> bool:
    value = _parse(text)
    return isinstance(value, dict) and bool(matching_forms(value))


def _parse(text: bytes) -> Any:
    """Return the value of a JSON text, or `NOT_JSON`."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return NOT_JSON


def _chain(head: list[bytes], pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces of `head`, each removed from it so that it can be freed, then the others."""
    while head:
        yield head.pop(0)
    yield from pieces
