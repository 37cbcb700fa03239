"""Record batches of Arrow files, in the stream format of the datasets library or in the file format."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

FILE_MAGIC = b"ARROW1"
"""First bytes of the file format."""


def read_arrow(path: Path) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield the record batches of an Arrow file, and the position in the file after each.

    The file is memory-mapped, because a batch may have thousands of rows of any size.
    """
    with pa.memory_map(str(path)) as file:
        is_file_format = file.read(len(FILE_MAGIC)) == FILE_MAGIC
        file.seek(0)
        if is_file_format:
            with pa.ipc.open_file(file) as reader:
                size, count = file.size(), reader.num_record_batches
                for index in range(count):
                    yield reader.get_batch(index), size * (index + 1) // count
            return
        with pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch, file.tell()


def count_rows(path: Path) -> int:
    """Return the number of rows of an Arrow file."""
    return sum(len(batch) for batch, _ in read_arrow(path))
