"""Rows of Parquet and Arrow files -> records."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dft.data.conversation import COLUMNS, FORMS, has_form
from dft.data.faults import BadLine
from dft.data.records import BATCH_RECORDS, NOTHING_MORE, PIECE, Record
from dft.data.sources import Source


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
