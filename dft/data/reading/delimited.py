"""Read rows of .csv and .tsv files as records."""

import codecs
import csv
import json
import re
from collections.abc import Iterator

from dft.data.conversations.column_rules import renamed_columns
from dft.data.conversations.forms import may_hold_conversation, no_form
from dft.data.conversations.row_json import UTF16_HINT
from dft.data.reading.data_file import DataFile
from dft.data.reading.records import MAX_RECORD_BYTES, Flaw, Record, unreadable_from_here
from dft.data.reading.text import TextReader

DELIMITERS = {"csv": ",", "tsv": "\t"}
OTHER_DELIMITERS = (";", "\t", "|", ",")
"""Delimiters to look for in a first row that is a single cell."""
SURROGATE = re.compile("[\ud800-\udfff]")


class DelimitedReader:
    """Reads the rows of a .csv or .tsv file as JSON objects of strings, without empty cells.

    The first row has the names of the columns. A cell may be quoted, and span several lines then.
    """

    def __init__(self, source: DataFile) -> None:
        self.source = source
        self._reader = TextReader(source)
        self._delimiter = DELIMITERS[source.kind]
        self._line = 1  # of the file, on which the next row begins

    def position(self) -> int:
        """Return the number of bytes of the file on disk read so far."""
        return self._reader.position()

    def take_unread(self) -> dict[str, int]:
        """Return no columns: all cells are read."""
        return {}

    def records(self) -> Iterator[Record]:
        """Yield the rows in order. Errors of the file are yielded as records with a flaw."""
        csv.field_size_limit(MAX_RECORD_BYTES)
        rows = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        names = None
        while True:
            line = self._line
            try:
                cells = next(rows, None)
            except csv.Error as error:
                kind = f"broken {self.source.kind}"
                yield Record(line, b"", unreadable_from_here(f"{kind}: {error}", kind))
                return
            if cells is None:
                break
            if not any(cells):
                continue
            if names is None:
                # pandas writes its index under an empty name, which no flag could name.
                names = [name or f"unnamed_{index}" for index, name in enumerate(cells)]
                flaw = self._header_flaw(names)
                if flaw is not None:
                    yield Record(line, b"", flaw)
                    return
            else:
                yield self._record(line, names, cells)
        yield from self._reader.final_flaws(self._line)

    def _header_flaw(self, names: list[str]) -> Flaw | None:
        if any(SURROGATE.search(name) for name in names):
            kind = "not valid UTF-8"
            hint = UTF16_HINT if any("\0" in name for name in names) else ""
            return Flaw(f"the first row is {kind}{hint}", kind, skippable=False)
        repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if repeated is not None:
            kind = "a column name that appears twice"
            return Flaw(f"the column '{repeated}' appears twice in the first row", kind, skippable=False)
        if not may_hold_conversation(renamed_columns(names, self.source.rules), self.source.rules):
            error = no_form(names, is_table=True)
            other = next((mark for mark in OTHER_DELIMITERS if len(names) == 1 and mark in names[0]), None)
            hint = (
                "" if other is None else f"; its cells are separated by {other!r}, not by {self._delimiter!r}"
            )
            hint += UTF16_HINT if any("\0" in name for name in names) else ""
            return Flaw(f"{error}{hint}", error.kind, skippable=False)
        return None

    def _record(self, line: int, names: list[str], cells: list[str]) -> Record:
        row = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
        try:
            text = json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            kind = "not valid UTF-8"
            text = json.dumps(row).encode()
            return Record(line, text, Flaw(kind, kind))
        if len(cells) != len(names):
            kind = "a row with another number of cells than the first row"
            return Record(line, text, Flaw(f"{len(cells)} cells, but the first row names {len(names)}", kind))
        return Record(line, text)

    def _lines(self) -> Iterator[str]:
        """Yield the lines of the file with their line ends. Bytes that are not UTF-8 become surrogates."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        rest = ""
        for piece in self._reader.pieces():
            *lines, rest = (rest + decoder.decode(piece)).split("\n")
            for text in lines:
                self._line += 1
                yield text + "\n"
        rest += decoder.decode(b"", final=True)
        if rest:
            yield rest
