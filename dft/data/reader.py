"""Files -> records of JSON text, found by their extent alone; `dft.data.conversation` parses them."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from dft.data.records import BATCH_RECORDS, LONGEST, NOTHING_MORE, PIECE, TOO_LONG, Batch, Record
from dft.data.scanner import BLANKS, CUT_STRING, Pending, Scanner
from dft.data.sources import Source
from dft.data.tables import TableReader

BATCH_BYTES = 4 << 20
SIP = 1 << 12
"""Bytes asked of pyarrow at a time: what it decompressed before it met damage within one call is lost."""
LOOKAHEAD = 4 << 20
"""Bytes within which the first line of a .jsonl file has to end to be told apart from an array."""
BOM = b"\xef\xbb\xbf"


def read_batches(source: Source) -> Iterator[Batch]:
    """The conversations of one file in order; a file without any gives a record with a fault that says so.

    Text files are an array if their first character is "[", except a `.jsonl` file whose first line is a
    whole array that other lines follow; else JSON Lines, blank lines passed over. A `.json` file whose first
    line is no whole value is one object over several lines.

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
        if records and (len(records) == BATCH_RECORDS or size + len(record.text) > BATCH_BYTES):
            position = reader.position()
            yield Batch(records, position - reported)
            records, size, reported = [], 0, position
        records.append(record)
        size += len(record.text)
    if none:
        records = [Record(1, b"", fault="there is no conversation in this file")]
    yield Batch(records, reader.position() - reported)


class TextReader:
    """Records of a JSON or JSON Lines file, compressed or not."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._position = 0
        self._damage: str | None = None  # why the bytes ended before the file did

    def position(self) -> int:
        """Bytes of the file on disk that were read so far."""
        return self._position

    def records(self) -> Iterator[Record]:
        pieces = self._pieces()
        head: list[bytes] = []  # what is read ahead to tell the kind of the file
        opening = b""
        for piece in pieces:
            head.append(piece if head else piece.removeprefix(BOM))
            opening = head[-1].lstrip(BLANKS)
            if opening:
                break
        if opening.startswith(b"["):
            is_array = self.source.kind == "json" or not _lines_of_arrays(head, pieces)
            parse = self._array if is_array else self._lines
        elif self.source.kind == "jsonl" or not opening or _first_line_is_whole(opening, head, pieces):
            parse = self._lines
        else:
            parse = self._one_object
        yield from parse(_chain(head, pieces))

    def _pieces(self) -> Iterator[bytes]:
        """The bytes of the file, decompressed. Ends early, with `_damage` set, where they cannot be read."""
        packed = self.source.compression
        read = {None: _read_plain, "gzip": _read_gzip, "zstd": _read_zstd}[packed]
        try:
            with open(self.source.path, "rb") as file:
                for piece in read(file):
                    self._position = file.tell()
                    yield piece
        except (OSError, EOFError, zlib.error) as error:
            system = error.strerror if isinstance(error, OSError) else None
            what = f"the {packed} stream is damaged or cut off" if packed and not system else "cannot be read"
            self._damage = f"{what} ({system or error}); {NOTHING_MORE}"

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
                    yield Record(number, line.rstrip(b"\r"))
            number += 1
            begun, size = [last], len(last)
        if self._damage is not None:
            yield Record(number, b"", fault=self._damage)
        else:
            yield from _line(number, b"".join(begun), size)

    def _one_object(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """The whole file."""
        pending = Pending()
        for piece in pieces:
            pending.add(piece)
        if self._damage is not None:
            yield Record(pending.line, b"", fault=self._damage)
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
                yield pending.broken(f"{reason}; {NOTHING_MORE}")
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
                yield pending.broken(f"text after the closing ']'; {NOTHING_MORE}")
                return
        if self._damage is not None:
            yield Record(pending.line, b"", fault=self._damage)

    def _unfinished_array(self, scanner: Scanner, pending: Pending) -> Iterator[Record]:
        if self._damage is not None:
            yield Record(pending.line, b"", fault=self._damage)
            return
        last = pending.take()
        # An element that lacks its "}" takes the "]" of the array for it.
        ends = scanner.depth == 1 and not scanner.in_string
        if last and not (ends and last[0].text.startswith(b"{") == last[0].text.endswith(b"}")):
            pending.line = last[0].line
            yield pending.broken(f"the element that begins here does not end; {NOTHING_MORE}")
        else:
            yield from last
            yield pending.broken("the closing ']' is missing")


def _line(number: int, line: bytes, size: int) -> list[Record]:
    """A line of `size` bytes; none if it is blank."""
    if size > LONGEST:
        return [Record(number, b"", fault=TOO_LONG)]
    return [Record(number, line.rstrip(b"\r"))] if line and not line.isspace() else []


# The two look-aheads append to `head` what they read.


def _lines_of_arrays(head: list[bytes], pieces: Iterator[bytes]) -> bool:
    """Whether the first line is an array of its own, and other lines follow it."""
    start = b"".join(head).lstrip(BLANKS)
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


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _chain(head: list[bytes], pieces: Iterator[bytes]) -> Iterator[bytes]:
    while head:
        yield head.pop(0)
    yield from pieces


def _read_plain(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while piece := stream.read1(PIECE):
            yield piece


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
        ended = False
        while not ended:
            sips: list[bytes] = []
            try:
                while len(sips) < PIECE // SIP and not ended:
                    sips.append(stream.read(SIP))
                    ended = not sips[-1]
            except OSError:
                yield b"".join(sips)
                raise
            yield b"".join(sips)
