"""Records -> sequences in one Arrow file, tokenized by several processes."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from dft.constants import IGNORE_INDEX
from dft.data.chat import ChatEncoder
from dft.data.faults import BadLine, Fault, Faults
from dft.data.reader import Record, parse_messages, read_records
from dft.errors import UserError

CHUNK = 256
"""Records a worker gets at a time: enough for the tokenizer's batch call, few enough to balance the load."""
SMALL = 1 << 20
"""Bytes below which starting processes costs more than it saves."""
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
UNTAUGHT = "the chat template renders nothing of the assistant's turns"
KEY = "S16"
"""numpy type of the digest that tells conversations apart."""


@dataclass
class Totals:
    """What became of the conversations of some files. `Counter`s are keyed by file where they say so.

    Attributes:
        conversations: conversations read, by file.
        dropped: conversations without a supervised token within the length limit, by file.
        truncated: other conversations that lost tokens to the limit.
        truncated_supervised: supervised tokens lost to the limit, those of dropped conversations included.
        endings: the stop token at the end of each supervised turn, None where a turn ends without one.
    """

    conversations: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    truncated_supervised: int = 0
    endings: Counter[str | None] = field(default_factory=Counter)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.conversations + other.conversations,
            self.dropped + other.dropped,
            self.truncated + other.truncated,
            self.truncated_supervised + other.truncated_supervised,
            self.endings + other.endings,
        )


@dataclass(frozen=True)
class Encoded:
    """Sequences of some files on disk, with what is needed to select and to count them.

    All arrays have one element per sequence.

    Attributes:
        path: Arrow stream with the columns input_ids and labels.
        rows: positions in that file.
        conversations: number of the conversation that a sequence comes from.
        keys: digest of that conversation's tokens; equal conversations have equal keys wherever they stand.
        sources: index into `files`.
        lengths, supervised: tokens.
    """

    path: Path
    files: list[str]
    rows: np.ndarray
    conversations: np.ndarray
    keys: np.ndarray
    sources: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> "Encoded":
        """The sequences at these indices, or under this boolean mask."""
        names = ("rows", "conversations", "keys", "sources", "lengths", "supervised")
        return replace(self, **{name: vars(self)[name][index] for name in names})

    def dataset(self) -> Dataset:
        whole = Dataset.from_file(str(self.path))
        return whole if len(self) == len(whole) else whole.select(self.rows)


@dataclass(frozen=True)
class Chunk:
    """What becomes of up to `CHUNK` records. Token ids and labels of all sequences lie end to end.

    `conversations` counts from 0 within the chunk; `sources` has the file of each sequence.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    conversations: list[int]
    keys: list[bytes]
    sources: list[str]
    faults: list[Fault]
    totals: Totals


# ---- one chunk ----


def encode_chunk(encoder: ChatEncoder, records: list[Record], max_length: int) -> Chunk:
    """Parses, renders, tokenizes, masks and truncates a few conversations."""
    parsed = [_parse(record) for record in records]
    encoded = iter(encoder.encode([messages for messages in parsed if not isinstance(messages, BadLine)]))
    ids, labels, supervised = [], [], []
    conversations, keys, sources, faults = [], [], [], []
    totals = Totals()
    for number, (record, messages) in enumerate(zip(records, parsed, strict=True)):
        examples = messages if isinstance(messages, BadLine) else next(encoded)
        if isinstance(examples, BadLine):
            faults.append(Fault(record.where, examples.kind, str(examples)))
            continue
        if not any(supervised_tokens(example.labels) for example in examples):
            faults.append(Fault(record.where, UNTAUGHT, UNTAUGHT))
            continue
        totals.conversations[record.file] += 1
        kept = [(e, count) for e in examples if (count := supervised_tokens(e.labels[:max_length]))]
        lost = sum(supervised_tokens(e.labels[max_length:]) for e in examples)
        totals.truncated_supervised += lost
        if not kept:
            totals.dropped[record.file] += 1
            continue
        totals.truncated += any(len(e.input_ids) > max_length for e in examples)
        digest = blake2b(digest_size=np.dtype(KEY).itemsize)
        for example, count in kept:
            tokens = example.input_ids[:max_length]
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
            ids.append(tokens)
            labels.append(example.labels[:max_length])
            supervised.append(count)
            totals.endings.update(example.endings)
        conversations += [number] * len(kept)
        keys += [digest.digest()] * len(kept)
        sources += [record.file] * len(kept)
    nothing = [np.zeros(0, dtype=np.int32)]
    return Chunk(
        np.concatenate(ids or nothing),
        np.concatenate(labels or nothing),
        np.array([len(one) for one in ids], dtype=np.int64),
        np.array(supervised, dtype=np.int64),
        conversations,
        keys,
        sources,
        faults,
        totals,
    )


def _parse(record: Record) -> list[dict] | BadLine:
    try:
        return parse_messages(record)
    except BadLine as error:
        return error


def supervised_tokens(labels: np.ndarray) -> int:
    return int(np.count_nonzero(labels != IGNORE_INDEX))


# ---- all chunks ----


def encode_files(
    files: list[str], path: Path, encoder: ChatEncoder, max_length: int, workers: int, faults: Faults
) -> tuple[Encoded, Totals]:
    """Writes the sequences of all files, in the order of the files, to an Arrow stream; adds to `faults`."""
    names = list(dict.fromkeys(files))
    numbers = {name: index for index, name in enumerate(names)}
    totals = Totals()
    records = 0
    conversations, keys, sources, lengths, supervised = [], [], [], [], []
    chunks = _encoded_chunks(files, encoder, max_length, workers)
    # Closing the generator ends its processes, also when writing fails half-way.
    with closing(chunks), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for size, chunk in chunks:
            faults.add(chunk.faults)
            totals += chunk.totals
            conversations.append(np.array(chunk.conversations, dtype=np.int64) + records)
            records += size
            keys.append(np.frombuffer(b"".join(chunk.keys), dtype=KEY))
            sources.append(np.array([numbers[name] for name in chunk.sources], dtype=np.int64))
            lengths.append(chunk.lengths)
            supervised.append(chunk.supervised)
            if len(chunk.lengths):
                offsets = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32)
                columns = [
                    pa.ListArray.from_arrays(offsets, flat) for flat in (chunk.input_ids, chunk.labels)
                ]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    none = np.zeros(0, dtype=np.int64)
    columns = [
        np.concatenate(parts) if parts else none
        for parts in (conversations, keys, sources, lengths, supervised)
    ]
    return Encoded(path, names, np.arange(len(columns[0])), *columns), totals


def _encoded_chunks(
    files: list[str], encoder: ChatEncoder, max_length: int, workers: int
) -> Iterator[tuple[int, Chunk]]:
    """(records, what became of them) in the order of the files, with a bar over the bytes read."""
    records = (record for name in files for record in read_records(name))
    batches = iter(lambda: list(islice(records, CHUNK)), [])
    size = sum(os.path.getsize(name) for name in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None, leave=False)
    with bar, one_thread_per_process():
        if workers <= 1 or size < SMALL:
            done = ((batch, encode_chunk(encoder, batch, max_length)) for batch in batches)
        else:
            done = _in_processes(batches, encoder, max_length, workers)
        with closing(done):
            for batch, chunk in done:
                bar.update(sum(len(record.text) for record in batch))
                yield len(batch), chunk


def _in_processes(
    batches: Iterable[list[Record]], encoder: ChatEncoder, max_length: int, workers: int
) -> Iterator[tuple[list[Record], Chunk]]:
    """Like `pool.map`, but with only a few batches per worker in memory at a time."""
    # fork shares the loaded tokenizer, and the children run nothing of torch. Fresh interpreters would each
    # have to import transformers first.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder, max_length))
    waiting: deque[tuple[list[Record], Future[Chunk]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_work, batch)))
            if len(waiting) >= 4 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, most likely for lack of memory; "
            f"lower --preprocessing_num_workers (now {workers})"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_per_process() -> Iterator[None]:
    """The tokenizer's own threads are off: processes are the parallelism, and forking threads may hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_worker: tuple[ChatEncoder, int]


def _start_worker(encoder: ChatEncoder, max_length: int) -> None:
    global _worker
    _worker = (encoder, max_length)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(records: list[Record]) -> Chunk:
    encoder, max_length = _worker
    return encode_chunk(encoder, records, max_length)
