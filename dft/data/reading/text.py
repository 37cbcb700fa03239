"""Split text files into records. The records are not parsed; `dft.data.conversations` does that."""

import zipfile
import zlib
from collections.abc import Iterator
from itertools import chain

from dft.data.reading.data_file import DataFile
from dft.data.reading.decompress import READERS, TrailingBytes
from dft.data.reading.json_array import BLANKS, UNCLOSED_STRING, ArrayScanner, PartialRecord
from dft.data.reading.records import (
    BOM,
    MAX_RECORD_BYTES,
    RECORD_TOO_LONG,
    Flaw,
    Record,
    unreadable_from_here,
)
from dft.data.reading.text_format import TextFormat, detect_format

NEEDS_MEMORY = "requires too much memory"
"""Part of the message of zstd for a frame whose window is larger than its decoder accepts."""


class TextReader:
    """Reads the records of a JSON or JSON Lines file, compressed or not."""

    def __init__(self, source: DataFile) -> None:
        self.source = source
        self._position = 0
        self._damage: Flaw | None = None  # reason why the file could not be read completely
        self._trailing = b""  # bytes after a complete compressed stream
        self._end = 1  # the line after the last record

    def position(self) -> int:
        """Return the number of bytes of the file on disk that were read so far."""
        return self._position

    def take_unread(self) -> dict[str, int]:
        """Return no columns: a text is always read as a whole."""
        return {}

    def records(self) -> Iterator[Record]:
        """Yield the records in order. Errors between them are yielded as records with a flaw."""
        text_format, pieces = detect_format(self.source.kind, self.pieces())
        if text_format is TextFormat.ARRAY:
            yield from self._read_array(pieces)
        elif text_format is TextFormat.LINES:
            yield from self._read_lines(pieces)
        else:
            yield from self._read_object(pieces)
        if self._trailing:
            yield self._trailing_record()

    def pieces(self) -> Iterator[bytes]:
        """Yield the decompressed bytes of the file. An unreadable byte ends them, see `final_flaws`."""
        compression = self.source.compression
        try:
            with self.source.open() as file:
                for piece in READERS[compression](file.stream):
                    self._position = file.position()
                    yield piece
        except TrailingBytes as error:
            self._trailing = error.data
        except zipfile.BadZipFile as error:
            kind = "the zip archive is damaged"
            self._damage = unreadable_from_here(f"{kind} ({error})", kind)
        except (OSError, EOFError, zlib.error) as error:
            self._damage = _damage_flaw(error, compression)

    def final_flaws(self, line: int) -> Iterator[Record]:
        """Yield the errors of a file whose pieces have all been read.

        Args:
            line: the line after the last record.
        """
        if self._damage is not None:
            yield Record(line, b"", self._damage)
        self._end = line
        if self._trailing:
            yield self._trailing_record()

    def _trailing_record(self) -> Record:
        size = len(self._trailing)
        if size > MAX_RECORD_BYTES:
            return Record(self._end, b"", RECORD_TOO_LONG)
        kind = f"bytes after the end of the {self.source.compression} stream"
        return Record(self._end, self._trailing, Flaw(f"{size:,} {kind}; remove them", kind))

    def _read_lines(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """Yield every line that is not blank."""
        number, size = 1, 0
        parts: list[bytes] = []  # parts of the current line; empty if it is too long to keep
        for piece in pieces:
            first, *lines = piece.split(b"\n")
            size += len(first)
            if size > MAX_RECORD_BYTES:
                parts.clear()
            else:
                parts.append(first)
            if not lines:
                continue
            yield from _line_record(number, b"".join(parts), size)
            *lines, last = lines
            for line in lines:
                number += 1
                if line and not line.isspace():
                    yield Record(number, line)
            number += 1
            parts, size = [last], len(last)
        if self._damage is not None:
            yield Record(number, b"", self._damage)
        else:
            yield from _line_record(number, b"".join(parts), size)
        self._end = number + (size > 0)

    def _read_object(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """Yield the whole file as one record."""
        partial = PartialRecord()
        for piece in pieces:
            partial.add(piece if partial.first is not None else piece.removeprefix(BOM))
        self._end = partial.line
        if self._damage is not None:
            yield Record(partial.line, b"", self._damage)
        else:
            yield from partial.take()

    def _read_array(self, pieces: Iterator[bytes]) -> Iterator[Record]:
        """Yield the elements of an array, regardless of their type."""
        scanner, partial = ArrayScanner(), PartialRecord()
        opened = after_comma = False
        for piece in pieces:
            start = 0
            if not opened:
                start = piece.find(b"[") + 1
                opened = start > 0
                partial.line += piece.count(b"\n", 0, start if opened else len(piece))
                if not opened:
                    continue
            commas, stop = scanner.scan(piece)
            for comma in commas:
                partial.add(piece[start:comma])
                yield from partial.take() or [partial.broken("expected a value, found ','")]
                start, after_comma = comma + 1, True
            if stop is None:
                partial.add(piece[start:])
                continue
            end, reason = stop
            partial.add(piece[start:end])
            if reason is not None:
                if reason != UNCLOSED_STRING:  # the element before the error is complete
                    yield from partial.take()
                yield partial.broken(reason, ends=True)
                return
            last = partial.take()
            if not last and after_comma:
                last = [partial.broken("expected a value, found ']'")]
            yield from last
            yield from self._read_after_array(partial, chain([piece[end + 1 :]], pieces))
            return
        yield from self._end_unclosed_array(scanner, partial)

    def _read_after_array(self, partial: PartialRecord, pieces: Iterator[bytes]) -> Iterator[Record]:
        """Read to the end of the file, and yield an error if anything but blanks follows the array."""
        for piece in pieces:
            text = piece.lstrip(BLANKS)
            partial.line += piece.count(b"\n", 0, len(piece) - len(text))
            if text:
                yield partial.broken("text after the closing ']'", ends=True)
                return
        self._end = partial.line
        if self._damage is not None:
            yield Record(partial.line, b"", self._damage)

    def _end_unclosed_array(self, scanner: ArrayScanner, partial: PartialRecord) -> Iterator[Record]:
        """Yield the last element of an array without a closing bracket, if it is complete, and the error."""
        if self._damage is not None:
            yield Record(partial.line, b"", self._damage)
            return
        self._end = partial.line
        last = partial.take()
        # An element without its closing "}" has consumed the array's "]" instead.
        closed = scanner.depth == 1 and not scanner.in_string
        if last and not (closed and last[0].text.startswith(b"{") == last[0].text.endswith(b"}")):
            partial.line = last[0].line
            yield partial.broken("the element that begins here does not end", ends=True)
        else:
            yield from last
            yield partial.broken("the closing ']' is missing")


def _line_record(number: int, line: bytes, size: int) -> list[Record]:
    """Return a list with the record of a line of `size` bytes; empty if the line is blank."""
    if size > MAX_RECORD_BYTES:
        return [Record(number, b"", RECORD_TOO_LONG)]
    # A byte order mark is kept as part of the first line, but a line that contains only the mark is blank.
    visible = line.removeprefix(BOM) if number == 1 else line
    return [Record(number, line)] if visible and not visible.isspace() else []


def _damage_flaw(error: OSError | EOFError | zlib.error, compression: str | None) -> Flaw:
    """Return the flaw of a file that could not be read completely."""
    if isinstance(error, OSError) and error.strerror:
        return unreadable_from_here(f"cannot be read ({error.strerror})", "cannot be read")
    if NEEDS_MEMORY in str(error):
        kind = "the zstd stream has a window of more than 128 MiB"
        return unreadable_from_here(
            f"{kind}; compress it again without --long, or with --long=27 at most", kind
        )
    kind = f"the {compression} stream is damaged or truncated" if compression else "cannot be read"
    return unreadable_from_here(f"{kind} ({error})", kind)
