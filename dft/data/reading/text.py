"""Files -> records of JSON text, found by their extent alone; `dft.data.conversations.forms` parses them."""

import json
import zlib
from collections.abc import Iterator
from typing import Any

from dft.data.conversations.forms import find_form
from dft.data.reading.decompress import READERS, Leftover
from dft.data.reading.json_array import BLANKS, CUT_STRING, Pending, Scanner
from dft.data.reading.records import (
    BATCH_BYTES,
    BATCH_RECORDS,
    BOM,
    LONGEST,
    MOST_TEXT,
    NO_CONVERSATION,
    TOO_LONG,
    Batch,
    Flaw,
    Record,
    end_of_reading,
    too_much_text,
)
from dft.data.reading.sources import Source
from dft.data.reading.tables import TableReader

LOOKAHEAD = 4 << 20
"""Bytes within which the first line of a .jsonl file has to end to be told apart from an array."""
NO_JSON = object()
NEEDS_MEMORY = "requires too much memory"
"""In what zstd says of a frame whose window is larger than its decoder accepts."""


def read_batches(source: Source) -> Iterator[Batch]:
    """The conversations of one file in order; a file without any gives a record with a fault that says so.

    Text files are an array if their first character is "[", except a `.jsonl` file whose first line is a
    whole array that other lines follow; else JSON Lines, blank lines passed over. A `.json` file whose first
    line is no whole value is one object over several lines, unless another line is a conversation.

    Memory stays bounded by the longest record, not by the file.
    """
    if source.kind in ("jsonl", "json"):
        reader: TextReader | TableReader = TextReader(source)
    else:
        reader = TableReader(source)
    records: list[Record] = []
    size, reported, none = 0, 0, True
    for record in reader.records():
        none = False
        length = len(record.text)
        if length > MOST_TEXT and record.flaw is None:
            record = record._replace(flaw=too_much_text(length))
        if records and (len(records) == BATCH_RECORDS or size + length > BATCH_BYTES):
            position = reader.position()
            yield Batch(records, position - reported)
            records, size, reported = [], 0, position
        records.append(record)
        size += length
    if none:
        records = [Record(1, b"", NO_CONVERSATION)]
    yield Batch(records, reader.position() - reported)


class TextReader:
    """Records of a JSON or JSON Lines file, compressed or not."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._position = 0
        self._damage: Flaw | None = None  # why the bytes ended before the file did
        self._leftover = b""  # what follows a compressed stream that is whole
        self._end = 1  # the line behind the last record

    def position(self) -> int:
        """Bytes of the file on disk that were read so far."""
        return self._position

    def records(self) -> Iterator[Record]:
        pieces = self._pieces()
        head: list[bytes] = []  # what is read ahead to tell the kind of the file
        opening = b""
        for piece in pieces:
            opening = (piece if head else piece.removeprefix(BOM)).lstrip(BLANKS)
            head.append(piece)
            if opening:
                break
        if opening.startswith(b"["):
            is_array = self.source.kind == "json" or not _lines_of_arrays(head, pieces)
            parse = self._array if is_array else self._lines
        elif (
            self.source.kind == "jsonl"
            or not opening
            or _first_line_is_whole(opening, head, pieces)
            or _another_line_is_whole(head, pieces)
        ):
            parse = self._lines
        else:
            parse = self._one_object
        yield from parse(_chain(head, pieces))
        if self._leftover:
            yield self._leftover_record()

    def _pieces(self) -> Iterator[bytes]:
        """The bytes of the file, decompressed. Ends early, with `_damage` set, where they cannot be read."""
        packed = self.source.compression
        try:
            with open(self.source.path, "rb") as file:
                for piece in READERS[packed](file):
                    self._position = file.tell()
                    yield piece
        except Leftover as error:
            self._leftover = error.rest
        except (OSError, EOFError, zlib.error) as error:
            self._damage = _why_it_ends(error, packed)

    def _leftover_record(self) -> Record:
        size = len(self._leftover)
        if size > LONGEST:
            return Record(self._end, b"", TOO_LONG)
        kind = f"bytes behind the end of the {self.source.compression} stream"
        return Record(self._end, self._leftover, Flaw(f"{size:,} {kind}; cut them off", kind))

    def _lines(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """Every line that is not blank."""
        number, size = 1, 0
        begun: list[bytes] = []  # a line whose end is not read yet; empty where it is too long to be kept
        for piece in pieces:
            first, *lines = piece.split(b"\n")
            size += len(first)
            if size > LONGEST:
                begun.clear()
            else:
                begun.append(first)
            if not lines:
                continue
            yield from _line(number, b"".join(begun), size)
            *lines, last = lines
            for line in lines:
                number += 1
                if line and not line.isspace():
                    yield Record(number, line)
            number += 1
            begun, size = [last], len(last)
        if self._damage is not None:
            yield Record(number, b"", self._damage)
        else:
            yield from _line(number, b"".join(begun), size)
        self._end = number + (size > 0)

    def _one_object(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """The whole file."""
        pending = Pending()
        for piece in pieces:
            pending.add(piece if pending.first is not None else piece.removeprefix(BOM))
        self._end = pending.line
        if self._damage is not None:
            yield Record(pending.line, b"", self._damage)
        else:
            yield from pending.take()

    def _array(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """The elements of an array, whatever is in them, and what is wrong between them."""
        scanner, pending = Scanner(), Pending()
        begun = no_value_yet = False
        for piece in pieces:
            start = 0
            if not begun:
                start = piece.find(b"[") + 1
                begun = start > 0
                pending.line += piece.count(b"\n", 0, start if begun else len(piece))
                if not begun:
                    continue
            commas, stop = scanner.scan(piece)
            for comma in commas:
                pending.add(piece[start:comma])
                yield from pending.take() or [pending.broken("expected a value, found ','")]
                start, no_value_yet = comma + 1, True
            if stop is None:
                pending.add(piece[start:])
                continue
            at, reason = stop
            pending.add(piece[start:at])
            if reason is not None:
                if reason != CUT_STRING:  # the element before it is whole
                    yield from pending.take()
                yield pending.broken(reason, ends=True)
                return
            found = pending.take()
            if not found and no_value_yet:
                found = [pending.broken("expected a value, found ']'")]
            yield from found
            yield from self._after_array(pending, piece[at + 1 :], pieces)
            return
        yield from self._unfinished_array(scanner, pending)

    def _after_array(self, pending: Pending, rest: bytes, pieces: Iterator[bytes]) -> Iterator[Record]:
        for piece in _chain([rest], pieces):
            text = piece.lstrip(BLANKS)
            pending.line += piece.count(b"\n", 0, len(piece) - len(text))
            if text:
                yield pending.broken("text after the closing ']'", ends=True)
                return
        self._end = pending.line
        if self._damage is not None:
            yield Record(pending.line, b"", self._damage)

    def _unfinished_array(self, scanner: Scanner, pending: Pending) -> Iterator[Record]:
        if self._damage is not None:
            yield Record(pending.line, b"", self._damage)
            return
        self._end = pending.line
        last = pending.take()
        # An element that lacks its "}" takes the "]" of the array for it.
        ends = scanner.depth == 1 and not scanner.in_string
        if last and not (ends and last[0].text.startswith(b"{") == last[0].text.endswith(b"}")):
            pending.line = last[0].line
            yield pending.broken("the element that begins here does not end", ends=True)
        else:
            yield from last
            yield pending.broken("the closing ']' is missing")


def _line(number: int, line: bytes, size: int) -> list[Record]:
    """A line of `size` bytes; none if it is blank."""
    if size > LONGEST:
        return [Record(number, b"", TOO_LONG)]
    # The mark at the beginning of a file is part of its first line, but makes it no less blank.
    visible = line.removeprefix(BOM) if number == 1 else line
    return [Record(number, line)] if visible and not visible.isspace() else []


def _why_it_ends(error: OSError | EOFError | zlib.error, packed: str | None) -> Flaw:
    """Why the bytes of a file end early."""
    if isinstance(error, OSError) and error.strerror:
        return end_of_reading(f"cannot be read ({error.strerror})", "cannot be read")
    if NEEDS_MEMORY in str(error):
        kind = "the zstd stream has a window of more than 128 MiB"
        return end_of_reading(f"{kind}; compress it again without --long, or with --long=27 at most", kind)
    kind = f"the {packed} stream is damaged or cut off" if packed else "cannot be read"
    return end_of_reading(f"{kind} ({error})", kind)


# The look-aheads append to `head` what they read.


def _lines_of_arrays(head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Whether the first line is an array of its own, and other lines follow it."""
    start = b"".join(head).removeprefix(BOM).lstrip(BLANKS)
    while len(start) < LOOKAHEAD and not start.partition(b"\n")[2].strip():
        piece = next(pieces, b"")
        if not piece:
            break
        head.append(piece)
        start += piece
    first, _, others = start.partition(b"\n")
    return bool(others.strip()) and _is_json(first)


def _first_line_is_whole(opening: bytes, head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Whether brackets and quotes of the line that begins with `opening` are balanced.

    A line that is whole but broken inside still is a line: it is told what is wrong, and the others are read.
    """
    scanner, text, size = Scanner(), opening, 0
    while size <= LONGEST:
        line, end, _ = text.partition(b"\n")
        scanner.scan(line)
        text = b"" if end else next(pieces, b"")
        if not text:
            break
        head.append(text)
        size += len(text)
    return scanner.depth == 0 and not scanner.in_string


def _another_line_is_whole(head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Whether the first line is the torn one of JSON Lines, and not where an object of several lines begins.

    A line that is a conversation tells, unless all lines together are one value.
    """
    wanted, size = LOOKAHEAD, 0
    while size <= wanted and (piece := next(pieces, b"")):
        head.append(piece)
        size += len(piece)
    text = b"".join(head).removeprefix(BOM).lstrip(BLANKS)
    if size <= wanted and _is_json(text):
        return False
    return any(_is_conversation(line) for line in text.split(b"\n")[1:])


def _is_json(text: bytes) -> bool:
    return _json(text) is not NO_JSON


def _is_conversation(text: bytes) -> bool:
    value = _json(text)
    return isinstance(value, dict) and find_form(value) is not None


def _json(text: bytes) -> Any:
    """The value of a text; `NO_JSON` if it is none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return NO_JSON


def _chain(head: list[bytes], pieces: Iterator[bytes]) -> Iterator[bytes]:
    while head:
        yield head.pop(0)
    yield from pieces
