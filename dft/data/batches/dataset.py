"""Dataset of prepared sequences in a memory-mapped Arrow file."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from torch.utils.data import Dataset

from dft.data.batches.base_scores import BaseFilter, BaseScores, FilterCounts, target_mask
from dft.labels import IGNORE_INDEX

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
        base_logp    (tokens,) float32, log-probability of each supervised token under the model before
                     training, NaN for the others; only with `base_scores`

    The file is opened when the first row is read.

    Args:
        path: Arrow stream of `SCHEMA` or `WEIGHTED_SCHEMA`. `datasets.Dataset.from_file` can also read it.
        order: (sequences,) indices into that file, row after row.
        offsets: (rows + 1,) row r holds `order[offsets[r]:offsets[r + 1]]`; None for one sequence per row.
        files: names of the data files, indexed by file number.

    Attributes:
        base_scores: scores of the model before training, or None; see `with_base_scores`.
        base_filter: selects the supervised tokens that are trained on, or None.
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
        self.base_scores: BaseScores | None = None
        self.base_filter: BaseFilter | None = None

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
            return {**self._sequence(self.order[row]), "origins": origins}
        members = self.order[self.offsets[row] : self.offsets[row + 1]]
        sequences = [self._sequence(member) for member in members]
        lengths = [len(sequence["labels"]) for sequence in sequences]
        if any("loss_weights" in sequence for sequence in sequences):
            for sequence, length in zip(sequences, lengths, strict=True):
                sequence.setdefault("loss_weights", np.ones(length, dtype=np.float32))
        columns = {name: np.concatenate([sequence[name] for sequence in sequences]) for name in sequences[0]}
        return {**columns, "seq_lengths": lengths, "origins": origins}

    def _sequence(self, index: int) -> dict[str, np.ndarray]:
        """Return the columns of a sequence of the Arrow file, (tokens,) each."""
        ids, labels = self._store.sequence(index)
        weights = self._store.loss_weights(index)
        columns = {"input_ids": ids, "labels": labels}
        if weights is not None:
            columns["loss_weights"] = weights
        if self.base_scores is not None:
            mask = target_mask(labels, weights)
            scores = np.full(len(labels), np.nan, dtype=np.float32)
            scores[mask] = self.base_scores.of_sequence(index)
            columns["base_logp"] = scores
            if self.base_filter is not None:
                keep = self.base_filter.keeps(scores[mask], labels[mask])
                labels = labels.copy()
                labels[np.flatnonzero(mask)[~keep]] = IGNORE_INDEX
                columns["labels"] = labels
        return columns

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def unpacked(self) -> "Sequences":
        """Return a dataset of the same sequences, one per row, in the order of the data files."""
        return self._with_order(np.sort(self.order))

    def sample(self, size: int, seed: int) -> "Sequences":
        """Return an unpacked dataset of at most `size` distinct random sequences of each data file."""
        order = np.unique(self.order)
        files = self._store.sources[order]
        generator = np.random.default_rng(seed)
        drawn = [generator.permutation(order[files == file])[:size] for file in np.unique(files)]
        return self._with_order(np.sort(np.concatenate(drawn)))

    def _with_order(self, order: np.ndarray, offsets: np.ndarray | None = None) -> "Sequences":
        """Return a dataset of other rows of the same file, with the same scores and filter."""
        other = Sequences(self.path, order, offsets, self.files)
        other.base_scores, other.base_filter = self.base_scores, self.base_filter
        return other

    @property
    def distinct(self) -> np.ndarray:
        """The indices of the sequences of all rows in the Arrow file, each once, ascending."""
        return np.unique(self.order)

    def target_counts(self) -> np.ndarray:
        """Return the number of tokens of each of the `distinct` sequences that enter the loss, int64.

        A filter is not considered. Reads all labels.
        """
        return np.concatenate([counts for counts, _ in self._store.targets()])[self.distinct]

    def with_base_scores(self, scores: BaseScores) -> "Sequences":
        """Return the dataset with a column `base_logp`."""
        other = self._with_order(self.order, self.offsets)
        other.base_scores = scores
        return other

    def filtered(self, base_filter: BaseFilter) -> tuple["Sequences", FilterCounts]:
        """Return the dataset without the supervision that a filter removes, and counts of what it removes.

        Sequences without any supervised token left are removed from the rows. The rows are not packed anew.
        """
        assert self.base_scores is not None
        size, files = len(self._store.lengths), self._store.sources
        counts, exempt, remaining = (np.zeros(size, dtype=np.int64) for _ in range(3))
        first, floor = 0, replace(base_filter, exempt_ids=())
        for batch_counts, targets in self._store.targets():
            owners = np.repeat(np.arange(first, first + len(batch_counts)), batch_counts)  # (targets,)
            is_scored = np.isin(owners, self.base_scores.indices)
            owners, targets = owners[is_scored], targets[is_scored]
            start, end = np.searchsorted(self.base_scores.indices, (first, first + len(batch_counts)))
            scores = self.base_scores.values[self.base_scores.offsets[start] : self.base_scores.offsets[end]]
            keeps = base_filter.keeps(scores, targets)
            counts += np.bincount(owners, minlength=size)
            remaining += np.bincount(owners[keeps], minlength=size)
            exempt += np.bincount(owners[keeps & ~floor.keeps(scores, targets)], minlength=size)
            first += len(batch_counts)
        order, number = self.order, max(len(self.files), int(files.max(initial=0)) + 1)
        total, dropped = (
            np.bincount(files[order], weights=column[order], minlength=number).astype(np.int64)
            for column in (counts, counts - remaining)
        )
        stays = remaining[order] > 0
        removed = FilterCounts(total, dropped, int(exempt[order].sum()), len(order), int((~stays).sum()))
        offsets = None
        if self.offsets is not None:
            bounds = np.concatenate([[0], np.cumsum(stays)])[self.offsets]
            offsets = np.concatenate([bounds[:1], bounds[1:][np.diff(bounds) > 0]])
        other = self._with_order(order[stays], offsets)
        other.base_filter = base_filter
        return other, removed

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
        if self.base_scores is not None:
            digest.update(f"{self.base_scores.key} {self.base_filter}".encode())
        return digest.hexdigest()

    def content_digest(self) -> str:
        """Return a digest of the tokens, labels and weights of the sequences, for any packing or order."""
        digest = xxhash.xxh3_128()
        self._store.update_digest(digest)
        digest.update(self.distinct.astype(np.int64).tobytes())
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

    def targets(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each record batch the number of targets of each sequence, and the ids of all targets."""
        for number, (labels, offsets) in enumerate(zip(self.labels, self.offsets, strict=True)):
            mask = labels != IGNORE_INDEX
            mask[offsets[:-1]] = False  # see `target_mask`
            if self.weights:
                weights = self.weights[number]
                for position in np.flatnonzero(weights.is_valid().to_numpy(zero_copy_only=False)):
                    span = slice(offsets[position], offsets[position + 1])
                    mask[span] &= weights[position].values.to_numpy() != 0
            yield np.add.reduceat(mask, offsets[:-1], dtype=np.int64), labels[mask]

    def update_digest(self, digest: Any) -> None:
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
