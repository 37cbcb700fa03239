"""Split a JSON array into the texts of its elements, reading it in pieces and without parsing them."""

import numpy as np

from dft.data.reading.records import MAX_RECORD_BYTES, RECORD_TOO_LONG, Flaw, Record, unreadable_from_here

BLANKS = b" \t\r\n"
BROKEN = "broken JSON array"
QUOTE, COMMA, LINE_END, OPEN, CLOSE = range(1, 6)
TOKENS = {'"': QUOTE, ",": COMMA, "\n": LINE_END, "[": OPEN, "{": OPEN, "]": CLOSE, "}": CLOSE}
TOKEN_TABLE = bytes(TOKENS.get(chr(byte), 0) for byte in range(256))
"""Table for `bytes.translate` that maps each byte to its token, or to 0 if it is not a token."""
UNCLOSED_STRING = "a string continues past the end of its line"
DEPTH_CHANGE = np.zeros(6, dtype=np.int64)
DEPTH_CHANGE[OPEN], DEPTH_CHANGE[CLOSE] = 1, -1


class ArrayScanner:
    """Finds the elements of an array by counting the brackets outside of strings.

    The array is passed in consecutive pieces, which may be split anywhere. No other checks are made.

    Attributes:
        depth: number of open brackets.
        in_string: whether the last piece ended inside a string.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False  # whether a backslash at the end of the last piece escapes the next byte
        self._has_value = False  # whether an element with brackets began since the last comma

    def scan(self, piece: bytes) -> tuple[list[int], tuple[int, str | None] | None]:
        """Find the ends of the outermost array's elements in the next piece.

        Returns:
            The positions of the commas at depth 1, and the end of the array: its position and, if the array
            is broken there, the reason. The end is None if the array continues in the next piece. Bytes after
            the end are not examined.
        """
        piece = self._blank_escapes(piece)
        codes = np.frombuffer(piece.translate(TOKEN_TABLE), dtype=np.uint8)
        positions = np.flatnonzero(codes)  # (tokens,)
        tokens = codes[positions]
        quotes = tokens == QUOTE
        # The sum may overflow: modulo 256 does not change whether it is odd.
        in_string = (np.cumsum(quotes, dtype=np.uint8) + np.uint8(self.in_string)) & 1 == 1
        stops: list[tuple[int, str | None]] = []
        unclosed = positions[in_string & (tokens == LINE_END)]
        if len(unclosed):
            stops.append((int(unclosed[0]), UNCLOSED_STRING))
        if len(positions):
            self.in_string = bool(in_string[-1])
        outside = ~(in_string | quotes) & (tokens != LINE_END)
        positions, tokens = positions[outside], tokens[outside]
        depth = self.depth + np.cumsum(DEPTH_CHANGE[tokens])
        if len(positions):
            self.depth = int(depth[-1])
        closed = np.flatnonzero(depth <= 0)
        if len(closed):
            end = int(positions[closed[0]])
            character = chr(piece[end])
            stops.append((end, None if character == "]" else f"unexpected {character!r}"))
        commas, missing_comma = self._find_commas(positions, tokens, depth)
        if missing_comma is not None:
            stops.append((missing_comma, "expected ',' or ']' after an element"))
        stop = min(stops, default=None)
        return (commas if stop is None else [comma for comma in commas if comma < stop[0]]), stop

    def _blank_escapes(self, piece: bytes) -> bytes:
        """Overwrite escaped backslashes and quotes, in pairs from the left, as a decoder reads them."""
        if self._escaped:
            piece = b"_" + piece[1:]
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._escaped = piece.endswith(b"\\")
        return piece

    def _find_commas(
        self, positions: np.ndarray, tokens: np.ndarray, depth: np.ndarray
    ) -> tuple[list[int], int | None]:
        """Find the commas between elements, and the first element that lacks one before it.

        Args:
            positions, tokens, depth: (tokens,) position and code of each token outside of strings, and the
                number of open brackets after it.
        """
        commas = (tokens == COMMA) & (depth == 1)
        begins = (tokens == OPEN) & (depth == 2)
        marks = np.flatnonzero(commas | begins)
        if not len(marks):
            return [], None
        is_value = begins[marks]
        after_value = np.concatenate([[self._has_value], is_value[:-1]])
        self._has_value = bool(is_value[-1])
        missing = positions[marks[is_value & after_value]]
        return positions[marks[~is_value]].tolist(), int(missing[0]) if len(missing) else None


class PartialRecord:
    """Accumulates the text of a record until its end has been read.

    Attributes:
        line: current line of the file, from 1.
        first: line of the first character of the record, or None if there are only blanks so far.
    """

    def __init__(self) -> None:
        self.line = 1
        self.first: int | None = None
        self._parts: list[bytes] = []  # empty if the record is too long to keep
        self._size = 0

    def add(self, part: bytes) -> None:
        """Append text and count its lines."""
        if self.first is None:
            text = part.lstrip(BLANKS)
            self.line += part.count(b"\n", 0, len(part) - len(text))
            if not text:
                return
            part, self.first = text, self.line
        self.line += part.count(b"\n")
        self._size += len(part)
        if self._size > MAX_RECORD_BYTES:
            self._parts.clear()
        else:
            self._parts.append(part)

    def take(self) -> list[Record]:
        """End the record. Return it in a list, which is empty if there are only blanks."""
        if self.first is None:
            return []
        if self._size > MAX_RECORD_BYTES:
            record = Record(self.first, b"", RECORD_TOO_LONG)
        else:
            record = Record(self.first, b"".join(self._parts).rstrip(BLANKS))
        self.first, self._parts, self._size = None, [], 0
        return [record]

    def broken(self, reason: str, ends: bool = False) -> Record:
        """Return a record that reports an error on the current line.

        Args:
            reason: the fault of the array.
            ends: whether the rest of the file is unreadable.
        """
        make_flaw = unreadable_from_here if ends else Flaw
        return Record(self.line, b"", make_flaw(f"{BROKEN}: {reason}", BROKEN))
