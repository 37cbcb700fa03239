"""Read rows of Parquet and Arrow files as records."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dft.data.conversations.column_meanings import MEANING_OF, MEDIA
from dft.data.conversations.column_rules import renamed_columns
from dft.data.conversations.forms import columns, may_hold_conversation, no_form
from dft.data.conversations.row_rules import RowRules
from dft.data.reading.arrow_files import read_arrow
from dft.data.reading.data_file import DataFile
from dft.data.reading.records import (
    MAX_BATCH_BYTES,
    MAX_BATCH_RECORDS,
    READ_SIZE,
    Flaw,
    Record,
    unreadable_from_here,
)


class TableReader:
    """Reads the rows of a Parquet or Arrow file as JSON without null values.

    Arrow gives all structs of a column the same keys, so a key with a null value was missing in the row.
    """

    def __init__(self, source: DataFile) -> None:
        self.source = source
        self._position = 0
        self._unread: Counter[str] = Counter()

    def position(self) -> int:
        """Return the number of bytes of the file on disk read so far. For Parquet it is an estimate."""
        return self._position

    def take_unread(self) -> dict[str, int]:
        """Return the number of values of each column that is not read, since the last call."""
        unread, self._unread = dict(self._unread), Counter()
        return unread

    def records(self) -> Iterator[Record]:
        """Yield the rows in order. Errors of the file are yielded as records with a flaw."""
        row, rules = self.source.rows_before, self.source.rules
        try:
            batches = self._read_parquet() if self.source.kind == "parquet" else self._read_arrow()
            for batch in batches:
                if not len(batch):
                    continue
                names = _columns_to_read(batch.schema.names, rules)
                if not may_hold_conversation(renamed_columns(names, rules), rules):
                    error = no_form(renamed_columns(batch.schema.names, rules), is_table=True)
                    yield Record(1, b"", Flaw(str(error), error.kind, skippable=False))
                    return
                for part in _split(_without_media(batch.select(names), rules)):
                    for text, flaw in _row_texts(part):
                        row += 1
                        yield Record(row, text, flaw)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            kind = f"the {self.source.kind} file is damaged"
            yield Record(row + 1, b"", unreadable_from_here(f"{kind} ({reason})", kind))

    def _read_parquet(self) -> Iterator[pa.RecordBatch]:
        size, rules = self.source.path.stat().st_size, self.source.rules
        # Column chunks are read through a buffer, not as a whole, because a file may be a single row group.
        with pq.ParquetFile(self.source.path, buffer_size=READ_SIZE) as file:
            names, rows = _columns_to_read(file.schema_arrow.names, rules), 0
            self._unread.update(_count_values(file, set(file.schema_arrow.names) - set(names)))
            # If the rows have no known form, all columns are read so that the error can name them.
            selected = names if may_hold_conversation(renamed_columns(names, rules), rules) else None
            rows_per_batch = _parquet_batch_rows(file.metadata, names)
            for batch in file.iter_batches(rows_per_batch, columns=selected, use_threads=False):
                rows += len(batch)
                self._position = size * rows // file.metadata.num_rows
                yield batch
        self._position = size

    def _read_arrow(self) -> Iterator[pa.RecordBatch]:
        for batch, position in read_arrow(self.source.path):
            self._position = position
            names = _columns_to_read(batch.schema.names, self.source.rules)
            for name in batch.schema.names:
                if name not in names:
                    self._unread[name] += len(batch) - batch.column(name).null_count
            yield batch
        self._position = self.source.path.stat().st_size


def _columns_to_read(names: list[str], rules: RowRules) -> list[str]:
    """Return the columns of a table that its rows need: the rest is only counted."""
    kept = {column for column, _ in rules.kept}
    known = {*columns(), *MEANING_OF}
    return [
        name for name in names if name in kept or any(new in known for new in renamed_columns([name], rules))
    ]


def _count_values(file: pq.ParquetFile, names: set[str]) -> dict[str, int]:
    """Return the number of values of columns, from the statistics of the file where it has them."""
    counts = dict.fromkeys(sorted(names), file.metadata.num_rows)
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            # The statistics of a list or an object count the values in it.
            if chunk.path_in_schema in names and chunk.is_stats_set and chunk.statistics.has_null_count:
                counts[chunk.path_in_schema] -= chunk.statistics.null_count
    return counts


def _without_media(batch: pa.RecordBatch, rules: RowRules) -> pa.RecordBatch:
    """Return a batch with images, videos and recordings replaced by how many there are."""
    for index, name in enumerate(batch.schema.names):
        values = batch.column(index)
        if not any(new in MEDIA for new in renamed_columns([name], rules)):
            continue
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            batch = batch.set_column(index, name, pc.list_value_length(values))
        elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            batch = batch.set_column(index, name, pc.if_else(values.is_valid(), 1, None))
    return batch


def _parquet_batch_rows(metadata: pq.FileMetaData, names: list[str]) -> int:
    """Return the number of rows that take up about `MAX_BATCH_BYTES` in these columns."""
    bytes_per_row = 1.0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names
        )
        bytes_per_row = max(bytes_per_row, size / max(group.num_rows, 1))
    return _batch_rows(bytes_per_row)


def _split(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield slices of a batch that are small enough to convert to Python objects."""
    rows = _batch_rows(batch.nbytes / len(batch))
    for start in range(0, len(batch), rows):
        yield batch.slice(start, rows)


def _batch_rows(bytes_per_row: float) -> int:
    return max(1, min(MAX_BATCH_RECORDS, int(MAX_BATCH_BYTES / max(bytes_per_row, 1.0))))


def _row_texts(batch: pa.RecordBatch) -> Iterator[tuple[bytes, Flaw | None]]:
    """Yield the JSON text of every row, or the reason why it has none. Raises ArrowException."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    except ValueError:  # a row has a string that is not UTF-8, or a time that Python cannot represent
        rows = []
    for index in range(len(batch)):
        try:
            row = rows[index] if rows else batch.slice(index, 1).to_pylist(maps_as_pydicts="lossy")[0]
            text = json.dumps(_without_nulls(row), ensure_ascii=False, default=_to_string).encode()
        except UnicodeDecodeError as error:
            kind = "not valid UTF-8"
            yield b"", Flaw(f"{kind} ({error.reason} at byte {error.start} of a string)", kind)
        except ValueError as error:
            kind = "a value that JSON cannot hold"
            yield b"", Flaw(f"{kind} ({error})", kind)
        else:
            yield text, None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _to_string(value: Any) -> str:
    """Convert a value without a JSON type: a date, a decimal, or a string stored as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
