"""Dataset of prepared sequences in a memory-mapped Arrow file."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from torch.utils.data import Dataset

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "source": pa.int32(),  # index of the data file, in the order of the data report
        "line": pa.int64(),
        "part": pa.int32(),  # index of the sequence in its conversation
        "reason": pa.string(),  # why it does not continue the previous sequence of its conversation, or ""
    }
)

WEIGHTED_SCHEMA = SCHEMA.append(pa.field("loss_weights", pa.list_(pa.float32())))
"""Schema of data with weights other than 1. Sequences whose weights are all 1 have null there."""


class Part(NamedTuple):
    """A sequence as a part of its conversation.

    Attributes:
        number: its number among the sequences of the conversation, from 1.
        total: number of sequences of the conversation.
        reason: why it does not continue the previous sequence; "" for the first one.
    """

    number: int
    total: int
    reason: str


class Sequences(Dataset):
    """Map-style dataset over an Arrow file, with one sequence per row or, if packed, several.

    A row is a dict with

        input_ids    (tokens,) int32
        labels       (tokens,) int32, -100 where a token is not supervised
        origins      (sequences, 2) int64, the file number and line number of each sequence
        seq_lengths  list of int, the tokens of each sequence in order; packed rows only
        loss_weights (tokens,) float32, weight of each token in the loss; only if any of them is not 1

    The file is opened when the first row is read.

    Args:
        path: Arrow stream of `SCHEMA` or `WEIGHTED_SCHEMA`. `datasets.Dataset.from_file` can also read it.
        order: (sequences,) indices into that file, row after row.
        offsets: (rows + 1,) row r holds `order[offsets[r]:offsets[r + 1]]`; None for one sequence per row.
        files: names of the data files, indexed by file number.
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
        """True if a row may hold several sequences."""
        return self.offsets is not None

    def __len__(self) -> int:
        return len(self.order) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return one row; see the class docstring.

        Raises:
            IndexError: there is no such row. Negative indices are not supported.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        origins = np.array(self.origins(row), dtype=np.int64)
        if self.offsets is None:
            ids, labels = self._store.sequence(self.order[row])
            weights = self._store.loss_weights(self.order[row])
            others = {} if weights is None else {"loss_weights": weights}
            return {"input_ids": ids, "labels": labels, "origins": origins, **others}
        members = self.order[self.offsets[row] : self.offsets[row + 1]]
        ids, labels = zip(*map(self._store.sequence, members), strict=True)
        lengths = [len(sequence) for sequence in ids]
        return {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "seq_lengths": lengths,
            "origins": origins,
            **self._packed_weights(members, lengths),
        }

    def _packed_weights(self, members: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
        """Return the `loss_weights` of the sequences of a row, {} if all are 1."""
        weights = [self._store.loss_weights(member) for member in members]
        if all(weight is None for weight in weights):
            return {}
        parts = [
            np.ones(length, dtype=np.float32) if weight is None else weight
            for weight, length in zip(weights, lengths, strict=True)
        ]
        return {"loss_weights": np.concatenate(parts)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def unpacked(self) -> "Sequences":
        """Return a dataset of the same sequences, one per row, in the order of the data files."""
        return Sequences(self.path, np.sort(self.order), files=self.files)

    def sample(self, size: int, seed: int) -> "Sequences":
        """Return an unpacked dataset of at most `size` distinct random sequences of each data file."""
        order = np.unique(self.order)
        files = self._store.sources[order]
        generator = np.random.default_rng(seed)
        drawn = [generator.permutation(order[files == file])[:size] for file in np.unique(files)]
        return Sequences(self.path, np.sort(np.concatenate(drawn)), files=self.files)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each row, (rows,) int64."""
        lengths = self._store.lengths[self.order]
        return lengths if self.offsets is None else np.add.reduceat(lengths, self.offsets[:-1])

    def digest(self) -> str:
        """Return a digest of the tokens, labels and weights of all rows, and of their order. Reads all."""
        digest = xxhash.xxh3_64()
        self._store.update_digest(digest)
        digest.update(self.order.tobytes())
        digest.update(b"" if self.offsets is None else self.offsets.tobytes())
        return digest.hexdigest()

    def origins(self, row: int) -> list[tuple[int, int]]:
        """Return the file number and line number of each sequence of a row."""
        members = [row] if self.offsets is None else range(self.offsets[row], self.offsets[row + 1])
        return [self._store.origin(self.order[member]) for member in members]

    def part(self, row: int) -> Part:
        """Return which part of its conversation a row is. The dataset must not be packed."""
        assert self.offsets is None
        return self._store.part(int(self.order[row]))

    @cached_property
    def _store(self) -> "_Store":
        return _Store(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy maps the file again in its own process; the operating system shares the pages.
        return {name: value for name, value in vars(self).items() if name not in ("_store", "lengths")}


class _Store:
    """Random access by index to the sequences of a memory-mapped Arrow stream."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batches = list(reader)
        self.first = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.ids, self.labels, self.offsets = [], [], []
        self.parts = [(batch.column("part"), batch.column("reason")) for batch in batches]
        has_weights = bool(batches) and "loss_weights" in batches[0].schema.names
        self.weights = [batch.column("loss_weights") for batch in batches] if has_weights else []
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
        """Number of tokens in each sequence, (sequences,) int64."""
        empty = [np.zeros(0, dtype=np.int64)]
        return np.concatenate([np.diff(offsets).astype(np.int64) for offsets in self.offsets] or empty)

    @property
    def sources(self) -> np.ndarray:
        """File number of each sequence, (sequences,) int64."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(files for files, _ in self.origins)])

    def update_digest(self, digest: xxhash.xxh3_64) -> None:
        """Add the tokens, labels and weights of all sequences to a digest."""
        for ids, labels, offsets in zip(self.ids, self.labels, self.offsets, strict=True):
            for array in (ids, labels, offsets):
                digest.update(array)
        for weights in self.weights:
            digest.update(weights.offsets.to_numpy())
            digest.update(weights.values.to_numpy())

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the input_ids and labels of a sequence, (tokens,) int32 each, without copying."""
        batch, position = self._locate(index)
        span = slice(self.offsets[batch][position], self.offsets[batch][position + 1])
        return self.ids[batch][span], self.labels[batch][span]

    def loss_weights(self, index: int) -> np.ndarray | None:
        """Return the weights of the tokens of a sequence, (tokens,) float32, or None if all are 1."""
        if not self.weights:
            return None
        batch, position = self._locate(index)
        weights = self.weights[batch][position].values
        return None if weights is None else weights.to_numpy()

    def origin(self, index: int) -> tuple[int, int]:
        """Return the file number and line number of a sequence."""
        batch, position = self._locate(index)
        files, lines = self.origins[batch]
        return int(files[position]), int(lines[position])

    def part(self, index: int) -> Part:
        """Return which part of its conversation a sequence is; the parts are stored one after the other."""
        position, reason = self._part(index)
        after = index + 1
        while after < self.first[-1] and self._part(after)[0] > 0:
            after += 1
        return Part(position + 1, position + after - index, reason)

    def _part(self, index: int) -> tuple[int, str]:
        batch, position = self._locate(index)
        numbers, reasons = self.parts[batch]
        return numbers[position].as_py(), reasons[position].as_py()

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the record batch that holds a sequence, and its position in that batch."""
        batch = int(np.searchsorted(self.first, index, side="right")) - 1
        return batch, int(index - self.first[batch])
