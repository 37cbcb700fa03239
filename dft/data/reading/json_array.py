"""Where the elements of a JSON array begin and end, found without parsing them and in pieces of any size."""

import numpy as np

from dft.data.reading.records import LONGEST, TOO_LONG, Flaw, Record, end_of_reading

BLANKS = b" \t\r\n"
BROKEN = "broken JSON array"
QUOTE, COMMA, LINE_END, OPEN, CLOSE = range(1, 6)
TOKENS = {'"': QUOTE, ",": COMMA, "\n": LINE_END, "[": OPEN, "{": OPEN, "]": CLOSE, "}": CLOSE}
CODES = bytes(TOKENS.get(chr(byte), 0) for byte in range(256))
"""Table for `bytes.translate`: what a byte is to the scanner, 0 for nothing."""
CUT_STRING = "a string goes on over the end of its line"
STEP = np.zeros(6, dtype=np.int64)
STEP[OPEN], STEP[CLOSE] = 1, -1


class Scanner:
    """Counts brackets outside of strings, in pieces that may be cut anywhere. Does not look at anything else.

    Attributes:
        depth: brackets that are open.
        in_string: whether the last piece ended in a string.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False  # whether a backslash at the end of the last piece escapes the next byte
        self._has_value = False  # whether an element with brackets began since the last comma

    def scan(self, piece: bytes) -> tuple[list[int], tuple[int, str | None] | None]:
        """Where the elements of the outermost array end in this piece.

        Returns:
            The positions of the commas at depth 1, and where the array ends, with the reason if it is broken
            there; None if it goes on in the next piece. Nothing after its end is looked at.
        """
        # Escapes that matter are blanked, in pairs from the left, which is how a decoder reads them.
        if self._escaped:
            piece = b"_" + piece[1:]
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._escaped = piece.endswith(b"\\")
        codes = np.frombuffer(piece.translate(CODES), dtype=np.uint8)
        at = np.flatnonzero(codes)  # (tokens,)
        kind = codes[at]
        quotes = kind == QUOTE
        # Modulo 256 does not change what is odd.
        in_string = (np.cumsum(quotes, dtype=np.uint8) + np.uint8(self.in_string)) & 1 == 1
        stops: list[tuple[int, str | None]] = []
        cut_strings = at[in_string & (kind == LINE_END)]
        if len(cut_strings):
            stops.append((int(cut_strings[0]), CUT_STRING))
        if len(at):
            self.in_string = bool(in_string[-1])
        outside = ~(in_string | quotes) & (kind != LINE_END)
        at, kind = at[outside], kind[outside]
        depth = self.depth + np.cumsum(STEP[kind])
        if len(at):
            self.depth = int(depth[-1])
        closed = np.flatnonzero(depth <= 0)
        if len(closed):
            end = int(at[closed[0]])
            character = chr(piece[end])
            stops.append((end, None if character == "]" else f"unexpected {character!r}"))
        commas = (kind == COMMA) & (depth == 1)
        begins = (kind == OPEN) & (depth == 2)
        marks = np.flatnonzero(commas | begins)
        is_value = begins[marks]
        before = np.concatenate([[self._has_value], is_value[:-1]]) if len(marks) else is_value
        twice = at[marks[is_value & before]]
        if len(twice):
            stops.append((int(twice[0]), "expected ',' or ']' after an element"))
        if len(marks):
            self._has_value = bool(is_value[-1])
        stop = min(stops, default=None)
        found = at[marks[~is_value]].tolist()
        return (found if stop is None else [comma for comma in found if comma < stop[0]]), stop


class Pending:
    """Text that becomes a record once its end is read.

    Attributes:
        line: the line that was reached.
        first: the line of the record's first character; None as long as there are only blanks.
    """

    def __init__(self) -> None:
        self.line = 1
        self.first: int | None = None
        self._parts: list[bytes] = []  # empty where the record is too long to be kept
        self._size = 0

    def add(self, part: bytes) -> None:
        if self.first is None:
            text = part.lstrip(BLANKS)
            self.line += part.count(b"\n", 0, len(part) - len(text))
            if not text:
                return
            part, self.first = text, self.line
        self.line += part.count(b"\n")
        self._size += len(part)
        if self._size > LONGEST:
            self._parts.clear()
        else:
            self._parts.append(part)

    def take(self) -> list[Record]:
        """The record that ends here; none if there are only blanks."""
        if self.first is None:
            return []
        if self._size > LONGEST:
            record = Record(self.first, b"", TOO_LONG)
        else:
            record = Record(self.first, b"".join(self._parts).rstrip(BLANKS))
        self.first, self._parts, self._size = None, [], 0
        return [record]

    def broken(self, why: str, ends: bool = False) -> Record:
        """What is wrong at the line that was reached; if it `ends` there, nothing behind it can be read."""
        make = end_of_reading if ends else Flaw
        return Record(self.line, b"", make(f"{BROKEN}: {why}", BROKEN))
