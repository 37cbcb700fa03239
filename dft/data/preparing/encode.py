"""Records -> sequences in one Arrow file, and what became of every record."""

import base64
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dft.data.batches.dataset import SCHEMA
from dft.data.conversations.faults import Fault, Faults
from dft.data.preparing.chunk import KEY, Chunk, Rejected, Totals, Work, encode_chunk
from dft.data.preparing.options import EncodeOptions
from dft.data.reading.records import Record
from dft.data.reading.sources import Source
from dft.data.reading.text import read_batches
from dft.data.sandbox.limits import TOO_LONG
from dft.data.sandbox.workers import WorkerLost, in_processes, one_thread_per_process
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError

SMALL = 1 << 20
"""Bytes of all files below which a second process costs more than it saves."""
BATCH_TOKENS = 1 << 22
"""Tokens of a batch of the Arrow file: large ones are written and found fast."""


@dataclass(frozen=True)
class Encoded:
    """Sequences of some files on disk, with what is needed to select and to count them.

    All arrays have one element per sequence.

    Attributes:
        path: Arrow stream of `dft.data.batches.dataset.SCHEMA`.
        rows: positions in that file.
        conversations: number of the conversation that a sequence comes from.
        keys: digest of that conversation's tokens; equal conversations have equal keys wherever they stand.
        taught: digest of its tokens and of which are supervised.
        sources, lines: where it stands.
        lengths, supervised: tokens.
    """

    path: Path
    rows: np.ndarray
    conversations: np.ndarray
    keys: np.ndarray
    taught: np.ndarray
    sources: np.ndarray
    lines: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> "Encoded":
        """The sequences at these indices, or under this boolean mask."""
        arrays = {name: value[index] for name, value in vars(self).items() if name != "path"}
        return replace(self, **arrays)


def encode_sources(
    sources: list[Source],
    path: Path,
    encoder: ChatEncoder,
    options: EncodeOptions,
    workers: int,
    faults: Faults,
    rejects: IO[str] | None = None,
) -> tuple[Encoded, list[Totals]]:
    """Writes the sequences of all files, in order, to an Arrow stream.

    Args:
        sources: the files; they are numbered as they stand here.
        faults: takes what cannot be used and is not kept.
        rejects: takes what is kept (`EncodeOptions.keep_rejected`), as lines of JSON with the text; "file" is
            the number of the file.

    Returns:
        The sequences, and for each file what became of its conversations.
    """
    totals = [Totals() for _ in sources]
    store = _Writer(path)
    aside = _Aside(path.parent, options.keep_rejected)
    chunks = _encoded_chunks(sources, encoder, options, workers, aside)
    # Closing the generator ends its processes, also when writing fails half-way.
    with aside, closing(chunks), store:
        for source, chunk in chunks:
            totals[source] += chunk.totals
            name = sources[source].name
            for one in chunk.rejected:
                if one.text is None:
                    faults.add([Fault(f"{name}:{one.line}", one.kind, one.reason)])
                else:
                    rejects.write(_reject_line(source, one))
            store.add(source, replace(chunk, rejected=[]))  # the store holds many, and texts may be long
    return store.encoded(), totals


class _Writer:
    """Chunks -> large batches of an Arrow stream, and the numbers of each sequence in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[tuple[int, Chunk]] = []
        self.waiting_tokens = 0
        self.read = 0
        self.columns: dict[str, list[np.ndarray]] = {
            one.name: [] for one in fields(Encoded) if one.name not in ("path", "rows")
        }

    def __enter__(self) -> None:
        self.sink = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, SCHEMA)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self.stream.close()
        self.sink.close()

    def add(self, source: int, chunk: Chunk) -> None:
        known = {
            "conversations": chunk.conversations + self.read,
            "sources": np.full(len(chunk.lengths), source, dtype=np.int32),
        }
        for name, parts in self.columns.items():
            parts.append(known[name] if name in known else vars(chunk)[name])
        self.read += chunk.totals.read
        self.waiting.append((source, chunk))
        self.waiting_tokens += len(chunk.input_ids)
        if self.waiting_tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        chunks = [chunk for _, chunk in self.waiting]
        if self.waiting_tokens:
            lengths = np.concatenate([chunk.lengths for chunk in chunks])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            flat = (
                np.concatenate([vars(chunk)[name] for chunk in chunks]) for name in ("input_ids", "labels")
            )
            files = np.repeat(
                np.array([source for source, _ in self.waiting], dtype=np.int32),
                [len(chunk.lengths) for chunk in chunks],
            )
            lines = np.concatenate([chunk.lines for chunk in chunks])
            columns = [*(pa.ListArray.from_arrays(offsets, one) for one in flat), files, lines]
            self.stream.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self.waiting, self.waiting_tokens = [], 0

    def encoded(self) -> Encoded:
        kinds = {"keys": KEY, "taught": KEY, "sources": np.int32}
        columns = {
            name: np.concatenate([np.zeros(0, dtype=kinds.get(name, np.int64)), *parts])
            for name, parts in self.columns.items()
        }
        return Encoded(path=self.path, rows=np.arange(len(columns["lengths"])), **columns)


Places = dict[int, tuple[int, int]]
"""Where in the file of an `_Aside` a text begins and how long it is, by the number of its record."""


class _Aside:
    """Texts that are kept but not parsed, on disk until their turn comes.

    They may be long: no process has to be sent them, and memory never holds those of all tasks under way.
    """

    def __init__(self, folder: Path, keep: bool) -> None:
        self.folder = folder
        self.keep = keep

    def __enter__(self) -> None:
        self.file = tempfile.TemporaryFile(dir=self.folder)

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, records: list[Record]) -> tuple[list[Record], Places]:
        """The records, those with a flaw without their text."""
        places: Places = {}
        left = records
        for number, record in enumerate(records):
            if record.flaw is None or not record.text:
                continue
            left = [*left[:number], record._replace(text=b""), *left[number + 1 :]]
            if self.keep:
                places[number] = (self.file.seek(0, os.SEEK_END), len(record.text))
                self.file.write(record.text)
        return left, places

    def take(self, rejected: Rejected, places: Places) -> Rejected:
        """The same with its text, if that was put aside."""
        if rejected.number not in places:
            return rejected
        start, size = places[rejected.number]
        self.file.seek(start)
        return replace(rejected, text=self.file.read(size))


def _encoded_chunks(
    sources: list[Source], encoder: ChatEncoder, options: EncodeOptions, workers: int, aside: _Aside
) -> Iterator[tuple[int, Chunk]]:
    """(number of the file, what became of some of its records) in order, with a bar over the bytes read.

    Raises:
        UserError: the chat template takes more than it may, or a process was killed.
    """
    size = sum(source.path.stat().st_size for source in sources)
    works = (
        ((index, batch.consumed, places), Work(source.name, number, records))
        for index, source in enumerate(sources)
        for number, batch in enumerate(read_batches(source))
        for records, places in [aside.put(batch.records)]
    )
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None, leave=False)
    workers = min(workers, 1) if size < SMALL else workers
    with bar, one_thread_per_process():
        if workers < 1:
            done = ((about, encode_chunk(encoder, options, work)) for about, work in works)
        else:
            done = in_processes(works, encode_within_limits, (encoder, options), workers)
        try:
            with closing(done):
                for (index, consumed, places), chunk in done:
                    bar.update(consumed)
                    yield index, replace(chunk, rejected=[aside.take(one, places) for one in chunk.rejected])
        except WorkerLost as error:
            if error.out_of_time:
                raise error.task.over_limit(TOO_LONG) from None
            raise UserError(
                "a tokenizing process was killed, most likely for lack of memory; "
                f"lower --preprocessing_num_workers (now {workers})"
            ) from None


def encode_within_limits(encoder: ChatEncoder, options: EncodeOptions, work: Work) -> Chunk:
    """`encode_chunk` in a process that ends if the chat template does not."""
    encoder.template.template.limited = True
    return encode_chunk(encoder, options, work)


def _reject_line(source: int, rejected: Rejected) -> str:
    row = {"file": source, "line": rejected.line, "reason": rejected.reason}
    try:
        row["text"] = rejected.text.decode()
    except UnicodeDecodeError:
        row["base64"] = base64.b64encode(rejected.text).decode()
    return json.dumps(row, ensure_ascii=False) + "\n"
