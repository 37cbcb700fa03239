"""Prepared sequences on disk, read as training rows."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "source": pa.int32(),  # number of the file, as the data report counts them
        "line": pa.int64(),
    }
)


class Sequences(Dataset):
    """Rows of one or, packed, several sequences of an Arrow file. Nothing is read before it is asked for.

    A row is `{"input_ids": (tokens,) int32, "labels": (tokens,) int32, "origins": (sequences, 2) int64}`: of
    each of its sequences the file, numbered as in the data report, and the line. Packed rows have
    `"seq_lengths"` too, the tokens of each of their sequences in order.

    Args:
        path: Arrow stream of `SCHEMA`. `datasets.Dataset.from_file` opens it as well.
        order: (sequences,) positions in that file, row after row.
        offsets: (rows + 1,) row r holds `order[offsets[r]:offsets[r + 1]]`; None for one sequence per row.
        files: the names of the files that the sequences number.
    """

    def __init__(
        self,
        path: Path,
        order: np.ndarray,
        offsets: np.ndarray | None = None,
        files: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.order = order
        self.offsets = offsets
        self.files = list(files)

    @property
    def packed(self) -> bool:
        return self.offsets is not None

    def __len__(self) -> int:
        return len(self.order) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises IndexError past the end, which ends a loop over the rows."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        origins = np.array(self.origins(row), dtype=np.int64)
        if self.offsets is None:
            ids, labels = self._store.sequence(self.order[row])
            return {"input_ids": ids, "labels": labels, "origins": origins}
        members = self.order[self.offsets[row] : self.offsets[row + 1]]
        ids, labels = zip(*map(self._store.sequence, members), strict=True)
        return {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "seq_lengths": [len(one) for one in ids],
            "origins": origins,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def unpacked(self) -> "Sequences":
        """The same sequences, one per row and in the order of the files."""
        return Sequences(self.path, np.sort(self.order), files=self.files)

    def sample(self, size: int, seed: int) -> "Sequences":
        """At most `size` different sequences of each file, drawn with a seed, one per row."""
        order = np.unique(self.order)
        files = self._store.sources[order]
        generator = np.random.default_rng(seed)
        drawn = [generator.permutation(order[files == file])[:size] for file in np.unique(files)]
        return Sequences(self.path, np.sort(np.concatenate(drawn)), files=self.files)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row, int64."""
        lengths = self._store.lengths[self.order]
        return lengths if self.offsets is None else np.add.reduceat(lengths, self.offsets[:-1])

    def origins(self, row: int) -> list[tuple[int, int]]:
        """(file, line) of every sequence of a row; files are numbered as in the data report."""
        members = [row] if self.offsets is None else range(self.offsets[row], self.offsets[row + 1])
        return [self._store.origin(self.order[member]) for member in members]

    @cached_property
    def _store(self) -> "_Store":
        return _Store(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets a copy maps the file for itself; the pages are shared all the same.
        return {name: value for name, value in vars(self).items() if name not in ("_store", "lengths")}


class _Store:
    """The sequences of a memory-mapped Arrow stream by number."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batches = list(reader)
        self.first = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.ids, self.labels, self.offsets = [], [], []
        for batch in batches:
            ids, labels = batch.column("input_ids"), batch.column("labels")
            self.ids.append(ids.values.to_numpy())
            self.labels.append(labels.values.to_numpy())
            self.offsets.append(ids.offsets.to_numpy())
        self.origins = [
            (batch.column("source").to_numpy(), batch.column("line").to_numpy()) for batch in batches
        ]

    @property
    def lengths(self) -> np.ndarray:
        """(sequences,) tokens of each, int64."""
        none = [np.zeros(0, dtype=np.int64)]
        return np.concatenate([np.diff(one).astype(np.int64) for one in self.offsets] or none)

    @property
    def sources(self) -> np.ndarray:
        """(sequences,) the file of each, int64."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(file for file, _ in self.origins)])

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        batch, within = self._place(number)
        span = slice(self.offsets[batch][within], self.offsets[batch][within + 1])
        return self.ids[batch][span], self.labels[batch][span]

    def origin(self, number: int) -> tuple[int, int]:
        batch, within = self._place(number)
        file, line = self.origins[batch]
        return int(file[within]), int(line[within])

    def _place(self, number: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self.first, number, side="right")) - 1
        return batch, int(number - self.first[batch])
