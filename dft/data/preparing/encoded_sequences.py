"""Sequences in an Arrow file, and arrays for selecting and counting them."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from dft.data.batches.dataset import SCHEMA, WEIGHTED_SCHEMA
from dft.data.preparing.chunk import DIGEST_DTYPE, EncodedChunk
from dft.data.preparing.traits import TRAITS_DTYPE

BATCH_TOKENS = 1 << 22
"""Tokens per record batch of the Arrow file; large batches are faster to write and to look up."""


@dataclass(frozen=True)
class EncodedSequences:
    """Sequences stored in an Arrow file, described by arrays with one element per sequence.

    Attributes:
        path: Arrow stream of `SCHEMA` or `WEIGHTED_SCHEMA` of `dft.data.batches.dataset`.
        rows: index into that file.
        conversations: number of the conversation that the sequence comes from.
        token_digests: digest of the token ids of that conversation; equal for equal conversations.
        label_digests: digest of its token ids, labels and weights.
        traits: its traits, see `dft.data.preparing.traits`.
        sources: file number.
        lines: line number.
        lengths: tokens.
        supervised: supervised tokens.
    """

    path: Path
    rows: np.ndarray
    conversations: np.ndarray
    token_digests: np.ndarray
    label_digests: np.ndarray
    traits: np.ndarray
    sources: np.ndarray
    lines: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> "EncodedSequences":
        """Return the sequences selected by an array of indices or a boolean mask."""
        arrays = {name: value[index] for name, value in vars(self).items() if name != "path"}
        return replace(self, **arrays)

    def count_conversations(self) -> int:
        """Return the number of distinct conversations; repeated ones count once."""
        return len(np.unique(self.conversations))


class SequenceWriter:
    """Context manager that writes encoded chunks to an Arrow stream in large batches.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: list[tuple[int, EncodedChunk]] = []
        self.pending_tokens = 0
        self.records = 0
        self.columns: dict[str, list[np.ndarray]] = {
            attribute.name: []
            for attribute in fields(EncodedSequences)
            if attribute.name not in ("path", "rows")
        }

    def __enter__(self) -> "SequenceWriter":
        self._open(SCHEMA)
        return self

    def _open(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.sink = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, schema)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._close()

    def _close(self) -> None:
        self.stream.close()
        self.sink.close()

    def add(self, source: int, chunk: EncodedChunk) -> None:
        """Append the sequences of a chunk of the file with number `source`."""
        columns = {
            **vars(chunk),
            "conversations": chunk.conversations + self.records,
            "sources": np.full(len(chunk.lengths), source, dtype=np.int32),
        }
        for name, parts in self.columns.items():
            parts.append(columns[name])
        self.records += chunk.counts.read
        self.pending.append((source, chunk))
        self.pending_tokens += len(chunk.input_ids)
        if self.pending_tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        chunks = [chunk for _, chunk in self.pending]
        if self.pending_tokens:
            lengths = np.concatenate([chunk.lengths for chunk in chunks])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            input_ids = np.concatenate([chunk.input_ids for chunk in chunks])
            labels = np.concatenate([chunk.labels for chunk in chunks])
            files = np.repeat(
                np.array([source for source, _ in self.pending], dtype=np.int32),
                [len(chunk.lengths) for chunk in chunks],
            )
            columns = [
                pa.ListArray.from_arrays(offsets, input_ids),
                pa.ListArray.from_arrays(offsets, labels),
                files,
                np.concatenate([chunk.lines for chunk in chunks]),
                np.concatenate([chunk.parts for chunk in chunks]),
                [reason for chunk in chunks for reason in chunk.reasons],
            ]
            weights = [sequence for chunk in chunks for sequence in chunk.loss_weights]
            if self.schema is SCHEMA and any(sequence is not None for sequence in weights):
                self._add_weights()
            if self.schema is WEIGHTED_SCHEMA:
                columns.append(pa.array(weights, type=pa.list_(pa.float32())))
            self.stream.write_batch(pa.record_batch(columns, schema=self.schema))
        self.pending, self.pending_tokens = [], 0

    def _add_weights(self) -> None:
        """Add the column of weights to the batches that have been written without it."""
        self._close()
        earlier = self.path.with_suffix(".unweighted")
        self.path.rename(earlier)
        self._open(WEIGHTED_SCHEMA)
        with pa.memory_map(str(earlier)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                weights = pa.nulls(batch.num_rows, type=pa.list_(pa.float32()))
                self.stream.write_batch(pa.record_batch([*batch.columns, weights], schema=WEIGHTED_SCHEMA))
        earlier.unlink()

    def result(self) -> EncodedSequences:
        """Return all sequences written."""
        digest = np.dtype(DIGEST_DTYPE)
        dtypes = {"token_digests": digest, "label_digests": digest, "sources": np.dtype(np.int32)}
        dtypes["traits"] = TRAITS_DTYPE
        columns = {
            name: np.concatenate([np.zeros(0, dtype=dtypes.get(name, np.dtype(np.int64))), *parts])
            for name, parts in self.columns.items()
        }
        return EncodedSequences(path=self.path, rows=np.arange(len(columns["lengths"])), **columns)
