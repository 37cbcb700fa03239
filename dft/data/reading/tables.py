"""Read rows of Parquet and Arrow files as records."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dft.data.conversations.forms import columns, describe_forms, find_form
from dft.data.reading.records import (
    MAX_BATCH_BYTES,
    MAX_BATCH_RECORDS,
    READ_SIZE,
    Flaw,
    Record,
    unreadable_from_here,
)
from dft.data.reading.sources import DataFile


class TableReader:
    """Reads the rows of a Parquet file or an Arrow stream as JSON without null values.

    Arrow gives all structs of a column the same keys, so a key with a null value was missing in the row.
    """

    def __init__(self, source: DataFile) -> None:
        self.source = source
        self._position = 0

    def position(self) -> int:
        """Return the number of bytes of the file on disk read so far. For Parquet it is an estimate."""
        return self._position

    def records(self) -> Iterator[Record]:
        """Yield the rows in order. Errors of the file are yielded as records with a flaw."""
        row = self.source.rows_before
        try:
            batches = self._read_parquet() if self.source.kind == "parquet" else self._read_arrow()
            for batch in batches:
                if not len(batch):
                    continue
                names = _known_columns(batch.schema.names)
                if find_form(names) is None:
                    yield Record(1, b"", _no_form(batch.schema.names))
                    return
                for part in _split(batch.select(names)):
                    for text, flaw in _row_texts(part):
                        row += 1
                        yield Record(row, text, flaw)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            kind = f"the {self.source.kind} file is damaged"
            yield Record(row + 1, b"", unreadable_from_here(f"{kind} ({reason})", kind))

    def _read_parquet(self) -> Iterator[pa.RecordBatch]:
        size = self.source.path.stat().st_size
        # Column chunks are read through a buffer, not as a whole, because a file may be a single row group.
        with pq.ParquetFile(self.source.path, buffer_size=READ_SIZE) as file:
            names, rows = _known_columns(file.schema_arrow.names), 0
            # If the rows have no known form, all columns are read so that the error can name them.
            selected = names if find_form(names) else None
            rows_per_batch = _parquet_batch_rows(file.metadata, names)
            for batch in file.iter_batches(rows_per_batch, columns=selected, use_threads=False):
                rows += len(batch)
                self._position = size * rows // file.metadata.num_rows
                yield batch
        self._position = size

    def _read_arrow(self) -> Iterator[pa.RecordBatch]:
        # Memory-mapped, because a batch may have thousands of rows of any size.
        with pa.memory_map(str(self.source.path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                self._position = file.tell()
                yield batch
            self._position = file.tell()


def _known_columns(names: list[str]) -> list[str]:
    return [name for name in columns() if name in names]


def _no_form(names: list[str]) -> Flaw:
    reason = f"no conversation; the columns are {', '.join(names)}, expected {describe_forms()}"
    return Flaw(reason, "no conversation in the columns", skippable=False)


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
