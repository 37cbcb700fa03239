"""Files -> records of JSON text, found by their extent alone; `dft.data.conversation` parses them."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dft.data.conversation import COLUMNS, FORMS, has_form
from dft.data.faults import BadLine
from dft.data.sources import Source

BATCH_RECORDS = 256
BATCH_BYTES = 4 << 20
PIECE = 1 << 18
"""Bytes read at a time: enough to hide what a step costs, few enough to bound the arrays made of them."""
SIP = 1 << 12
"""Bytes asked of pyarrow at a time: what it decompressed before it met damage within one call is lost."""
LONGEST = 1 << 30
"""Bytes of the longest record that is read."""
TOO_LONG = "longer than 1 GiB"
LOOKAHEAD = 4 << 20
"""Bytes within which the first line of a .jsonl file has to end to be told apart from an array."""
BOM = b"\xef\xbb\xbf"
BLANKS = b" \t\r\n"
NOTHING_MORE = "nothing from here on can be read"


class Record(NamedTuple):
    """One conversation as it stands in a file, not parsed yet.

    Attributes:
        line: from 1; where a conversation begins in a text file, the number of the row in a table.
        text: its JSON, verbatim from text files, without the line end.
        fault: why it cannot be read, or why nothing can from here on; `text` is empty then.
    """

    line: int
    text: bytes
    fault: str | None = None


class Batch(NamedTuple):
    """Up to 256 records with about 4 MiB of text, or one that is longer.

    Attributes:
        records: in the order of the file, at least one.
        consumed: bytes of the file on disk read since the batch before.
    """

    records: list[Record]
    consumed: int


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


# ---- text files ----


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

    def _after_array(self, pending: "Pending", rest: bytes, pieces: Iterator[bytes]) -> Iterator[Record]:
        for piece in _chain([rest], pieces):
            text = piece.lstrip(BLANKS)
            pending.line += piece.count(b"\n", 0, len(piece) - len(text))
            if text:
                yield pending.broken(f"text after the closing ']'; {NOTHING_MORE}")
                return
        if self._damage is not None:
            yield Record(pending.line, b"", fault=self._damage)

    def _unfinished_array(self, scanner: "Scanner", pending: "Pending") -> Iterator[Record]:
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


# ---- the extent of JSON values ----

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
            record = Record(self.first, b"", fault=TOO_LONG)
        else:
            record = Record(self.first, b"".join(self._parts).rstrip(BLANKS))
        self.first, self._parts, self._size = None, [], 0
        return [record]

    def broken(self, why: str) -> Record:
        return Record(self.line, b"", fault=f"broken JSON array: {why}")


# ---- tables ----


class TableReader:
    """Rows of a Parquet file or of an Arrow stream as JSON, without their nulls.

    Arrow gives all structs of a column the same keys; a key that is null was not there before.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._position = 0

    def position(self) -> int:
        """Bytes of the file on disk that were read so far, estimated by rows in Parquet files."""
        return self._position

    def records(self) -> Iterator[Record]:
        row = self.source.rows_before
        try:
            batches = self._parquet() if self.source.kind == "parquet" else self._arrow()
            for batch in batches:
                for start in range(0, len(batch), BATCH_RECORDS):
                    for text, fault in _row_texts(batch.slice(start, BATCH_RECORDS)):
                        row += 1
                        yield Record(row, text, fault)
        except BadLine as error:
            yield Record(1, b"", fault=str(error))
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            fault = f"the {self.source.kind} file is damaged ({reason}); {NOTHING_MORE}"
            yield Record(row + 1, b"", fault)

    def _parquet(self) -> Iterator[pa.RecordBatch]:
        size = self.source.path.stat().st_size
        # Column chunks are read through a buffer instead of whole: a file may be a single row group.
        with pq.ParquetFile(self.source.path, buffer_size=PIECE) as file:
            known, rows = _known_columns(file.schema_arrow.names), 0
            for batch in file.iter_batches(BATCH_RECORDS, columns=known, use_threads=False):
                rows += len(batch)
                self._position = size * rows // file.metadata.num_rows
                yield batch
        self._position = size

    def _arrow(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self.source.path)) as file, pa.ipc.open_stream(file) as stream:
            known = _known_columns(stream.schema.names)
            for batch in stream:
                self._position = file.tell()
                yield batch.select(known)
            self._position = file.tell()


def _known_columns(names: list[str]) -> list[str]:
    """Raises BadLine if there is no conversation among them."""
    if not has_form(names):
        kind = "no conversation in the columns"
        raise BadLine(f"no conversation; the columns are {', '.join(names)}, expected {FORMS}", kind)
    return [name for name in COLUMNS if name in names]


def _row_texts(batch: pa.RecordBatch) -> Iterator[tuple[bytes, str | None]]:
    """JSON of every row, or why there is none. Raises ArrowException."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    except ValueError:  # of one row: a string that is no UTF-8, a time that Python does not have
        rows = []
    for index in range(len(batch)):
        try:
            row = rows[index] if rows else batch.slice(index, 1).to_pylist(maps_as_pydicts="lossy")[0]
            text = json.dumps(_without_nulls(row), ensure_ascii=False, default=_plain).encode()
        except UnicodeDecodeError as error:
            yield b"", f"not valid UTF-8 ({error.reason} at byte {error.start} of a string)"
        except ValueError as error:
            yield b"", f"a value that JSON cannot hold ({error})"
        else:
            yield text, None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _plain(value: Any) -> str:
    """What JSON has no form for: bytes that some writers make of strings; dates, decimals."""
    return value.decode() if isinstance(value, bytes) else str(value)
