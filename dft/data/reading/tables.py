"""Rows of Parquet and Arrow files -> records."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dft.data.conversations.forms import columns, describe_forms, find_form
from dft.data.reading.records import BATCH_BYTES, BATCH_RECORDS, PIECE, Flaw, Record, end_of_reading
from dft.data.reading.sources import Source


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
                if not len(batch):
                    continue
                known = [name for name in columns() if name in batch.schema.names]
                if find_form(known) is None:
                    yield Record(1, b"", _no_form(batch.schema.names))
                    return
                for part in _parts(batch.select(known)):
                    for text, flaw in _row_texts(part):
                        row += 1
                        yield Record(row, text, flaw)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            kind = f"the {self.source.kind} file is damaged"
            yield Record(row + 1, b"", end_of_reading(f"{kind} ({reason})", kind))

    def _parquet(self) -> Iterator[pa.RecordBatch]:
        size = self.source.path.stat().st_size
        # Column chunks are read through a buffer instead of whole: a file may be a single row group.
        with pq.ParquetFile(self.source.path, buffer_size=PIECE) as file:
            names, rows = file.schema_arrow.names, 0
            known = [name for name in columns() if name in names]
            # Without a form, all columns are read so that the error can name them.
            selected = known if find_form(known) else None
            at_once = _rows_at_once(file.metadata, known)
            for batch in file.iter_batches(at_once, columns=selected, use_threads=False):
                rows += len(batch)
                self._position = size * rows // file.metadata.num_rows
                yield batch
        self._position = size

    def _arrow(self) -> Iterator[pa.RecordBatch]:
        # Mapped, since a batch may have thousands of rows of any size.
        with pa.memory_map(str(self.source.path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                self._position = file.tell()
                yield batch
            self._position = file.tell()


def _no_form(names: list[str]) -> Flaw:
    """Not to be skipped: every row of the table would be lost."""
    reason = f"no conversation; the columns are {', '.join(names)}, expected {describe_forms()}"
    return Flaw(reason, "no conversation in the columns", skippable=False)


def _rows_at_once(metadata: pq.FileMetaData, known: list[str]) -> int:
    """Rows of a Parquet file that have about as many bytes as a batch, in the columns that are read."""
    most = 1.0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        size = sum(
            one.total_uncompressed_size for one in columns if one.path_in_schema.split(".")[0] in known
        )
        most = max(most, size / max(group.num_rows, 1))
    return _rows_in_a_batch(most)


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in slices that are not too large to be made Python objects of."""
    rows = _rows_in_a_batch(batch.nbytes / len(batch))
    for start in range(0, len(batch), rows):
        yield batch.slice(start, rows)


def _rows_in_a_batch(bytes_per_row: float) -> int:
    return max(1, min(BATCH_RECORDS, int(BATCH_BYTES / max(bytes_per_row, 1.0))))


def _row_texts(batch: pa.RecordBatch) -> Iterator[tuple[bytes, Flaw | None]]:
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
            kind = "not valid UTF-8"
            yield b"", Flaw(f"{kind} ({error.reason} at byte {error.start} of a string)", kind)
        except ValueError as error:
            kind = "a value that JSON cannot hold"
            yield b"", Flaw(f"{kind} ({error})", kind)
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
