"""Read the records of one data file in batches."""

from collections.abc import Iterator

from dft.data.reading.data_file import TEXT_KINDS, DataFile
from dft.data.reading.delimited import DELIMITERS, DelimitedReader
from dft.data.reading.records import (
    MAX_BATCH_BYTES,
    MAX_BATCH_RECORDS,
    MAX_TEXT_BYTES,
    NO_CONVERSATION,
    Batch,
    Record,
    too_much_text,
)
from dft.data.reading.tables import TableReader
from dft.data.reading.text import TextReader


def read_batches(source: DataFile) -> Iterator[Batch]:
    """Yield the records of one file in order, without parsing them.

    Errors of the file itself, including the absence of any record, are yielded as records with a flaw. Memory
    is bounded by the longest record, not by the size of the file.
    """
    reader = _reader_of(source)
    records: list[Record] = []
    size, reported, is_empty = 0, 0, True
    for record in reader.records():
        is_empty = False
        length = len(record.text)
        if length > MAX_TEXT_BYTES and record.flaw is None:
            record = record._replace(flaw=too_much_text(length))
        if records and (len(records) == MAX_BATCH_RECORDS or size + length > MAX_BATCH_BYTES):
            position = reader.position()
            yield Batch(records, position - reported, reader.take_unread())
            records, size, reported = [], 0, position
        records.append(record)
        size += length
    if is_empty:
        records = [Record(1, b"", NO_CONVERSATION)]
    yield Batch(records, reader.position() - reported, reader.take_unread())


def _reader_of(source: DataFile) -> TextReader | DelimitedReader | TableReader:
    if source.kind in DELIMITERS:
        return DelimitedReader(source)
    return TextReader(source) if source.kind in TEXT_KINDS.values() else TableReader(source)
