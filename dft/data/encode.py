"""Records -> sequences in one Arrow file, and what became of every record."""

import base64
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dft.constants import IGNORE_INDEX
from dft.data.chat import ChatEncoder, Example
from dft.data.conversation import Conversation, parse_conversation
from dft.data.dataset import SCHEMA
from dft.data.faults import BadLine, Fault, Faults
from dft.data.reader import Record, read_batches
from dft.data.selfcheck import check_examples
from dft.data.sources import Source
from dft.data.workers import in_processes, one_thread_per_process
from dft.errors import UserError

TRUNCATIONS = ("right", "left", "drop", "error")
SMALL = 1 << 20
"""Bytes of all files below which starting processes costs more than it saves."""
BATCH_TOKENS = 1 << 22
"""Tokens of a batch of the Arrow file: large ones are written and found fast."""
CHECKED_FIRST, CHECKED = 32, 1
"""Conversations of the first, and of every other chunk of a file that the self-check looks at."""
UNTAUGHT = "the chat template renders nothing of the assistant's turns"
TOO_LONG = "longer than --max_length"
KEY = "S16"
"""numpy type of the digest that tells conversations apart."""


@dataclass(frozen=True)
class EncodeOptions:
    """What besides tokenizer and template decides how one conversation becomes sequences.

    Attributes:
        truncation: which end of a sequence longer than `max_length` is cut, or "drop", or "error".
        last_turn_only: supervise the last assistant turn of a conversation alone.
        keep_rejected: keep the text of what cannot be used.
    """

    max_length: int
    truncation: str = "right"
    last_turn_only: bool = False
    keep_rejected: bool = False


@dataclass
class Totals:
    """What became of the conversations of one file, before any selection.

    Attributes:
        read: records in the file, whatever became of them.
        rejected: records that cannot be used, by kind of fault.
        dropped: conversations without a supervised token within the length limit.
        too_long: conversations of which sequences were dropped for their length.
        truncated: other conversations that were cut at the limit.
        lost_supervised: supervised tokens lost to the limit, those of dropped conversations included.
        lost_endings: supervised turns that lost their last token to the limit.
        endings: the stop token at the end of each supervised turn that is left, None where it has none.
        unknown: tokens that stand for text outside of the vocabulary.
        roles: turns of each role.
        turns: conversations of each number of turns.
    """

    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    too_long: int = 0
    truncated: int = 0
    lost_supervised: int = 0
    lost_endings: int = 0
    endings: Counter[str | None] = field(default_factory=Counter)
    unknown: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(vars(self)[one.name] + vars(other)[one.name] for one in fields(self)))


@dataclass(frozen=True)
class Encoded:
    """Sequences of some files on disk, with what is needed to select and to count them.

    All arrays have one element per sequence.

    Attributes:
        path: Arrow stream of `dft.data.dataset.SCHEMA`.
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


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used. `text` is there only if it is to be kept."""

    line: int
    kind: str
    reason: str
    text: bytes | None


@dataclass(frozen=True)
class Work:
    """A chunk to encode: some consecutive records of the file called `name`, the `number`-th such chunk."""

    name: str
    number: int
    records: list[Record]


@dataclass(frozen=True)
class Chunk:
    """What became of some records. Token ids and labels of all sequences lie end to end.

    `conversations` counts from 0 within the chunk.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    conversations: np.ndarray
    lines: np.ndarray
    keys: np.ndarray
    taught: np.ndarray
    rejected: list[Rejected]
    totals: Totals


# ---- one chunk ----


def encode_chunk(encoder: ChatEncoder, options: EncodeOptions, work: Work) -> Chunk:
    """Parses, renders, tokenizes, masks and truncates a few conversations, and checks a sample of them.

    Raises:
        UserError: the self-check found that a conversation is not supervised as it should be.
    """
    parsed = [_parse(record, options) for record in work.records]
    encoded = iter(encoder.encode([one for one in parsed if isinstance(one, Conversation)]))
    kept: list[tuple[int, int, list[Example], bytes, bytes]] = []
    usable, rejected, totals = [], [], Totals(read=len(parsed))
    for number, (record, conversation) in enumerate(zip(work.records, parsed, strict=True)):
        try:
            if isinstance(conversation, BadLine):
                raise conversation
            examples = next(encoded)
            if isinstance(examples, BadLine):
                raise examples
            if not any(supervised_tokens(example.labels) for example in examples):
                raise BadLine(UNTAUGHT, UNTAUGHT)
            within = [one for example in examples if (one := fit(example, options, totals))]
        except BadLine as error:
            totals.rejected[error.kind] += 1
            text = record.text if options.keep_rejected else None
            rejected.append(Rejected(record.line, error.kind, str(error), text))
            continue
        _count(conversation, examples, within, totals, options)
        usable.append((record, conversation))
        if within:
            kept.append((number, record.line, within, *digests(within)))
    sample = usable[: CHECKED if work.number else CHECKED_FIRST]
    for index, error in check_examples(encoder, [conversation for _, conversation in sample]):
        raise UserError(f"{work.name}:{sample[index][0].line}: {error}")
    chunk = _chunk(kept, rejected, totals)
    totals.unknown = int(np.isin(chunk.input_ids, [*encoder.unknown_ids]).sum()) if encoder.unknown_ids else 0
    return chunk


def fit(example: Example, options: EncodeOptions, totals: Totals) -> Example | None:
    """The sequence within the limit, None if it has nothing left to teach; adds what is lost to `totals`.

    Raises:
        BadLine: it is too long, and that is to be an error.
    """
    length, limit = len(example.input_ids), options.max_length
    before = supervised_tokens(example.labels)
    if length <= limit:
        return example if before else None
    if options.truncation == "error":
        raise BadLine(f"{length:,} tokens, longer than --max_length {limit}", TOO_LONG)
    if options.truncation == "drop":
        totals.lost_supervised += before
        totals.lost_endings += len(example.ends)
        return None
    start = length - limit if options.truncation == "left" else 0
    labels = example.labels[start : start + limit].copy()
    labels[0] = IGNORE_INDEX  # its context is gone
    whole = (example.ends > start) & (example.ends < start + limit)
    after = supervised_tokens(labels)
    totals.lost_supervised += before - after
    totals.lost_endings += int((~whole).sum())
    if not after:
        return None
    endings = tuple(ending for ending, there in zip(example.endings, whole, strict=True) if there)
    return Example(example.input_ids[start : start + limit], labels, endings, example.ends[whole] - start)


def supervised_tokens(labels: np.ndarray) -> int:
    return int(np.count_nonzero(labels != IGNORE_INDEX))


def digests(examples: list[Example]) -> tuple[bytes, bytes]:
    """Of the tokens of a conversation, and of the tokens together with their supervision."""
    tokens = blake2b(digest_size=np.dtype(KEY).itemsize)
    for example in examples:
        tokens.update(len(example.input_ids).to_bytes(8, "little") + example.input_ids.tobytes())
    taught = tokens.copy()
    for example in examples:
        taught.update(example.labels.tobytes())
    return tokens.digest(), taught.digest()


def _parse(record: Record, options: EncodeOptions) -> Conversation | BadLine:
    if record.fault is not None:
        return BadLine(record.fault, record.fault.split(" (")[0].split(":")[0])
    try:
        conversation = parse_conversation(record.text)
    except BadLine as error:
        return error
    return conversation.last_turn_only() if options.last_turn_only else conversation


def _count(
    conversation: Conversation,
    examples: list[Example],
    within: list[Example],
    totals: Totals,
    options: EncodeOptions,
) -> None:
    totals.roles.update(message["role"] for message in conversation.messages)
    totals.turns[len(conversation.messages)] += 1
    over = any(len(example.input_ids) > options.max_length for example in examples)
    if over and options.truncation == "drop":
        totals.too_long += 1
    elif not within:
        totals.dropped += 1
    elif over:
        totals.truncated += 1
    for example in within:
        totals.endings.update(example.endings)


def _chunk(
    kept: list[tuple[int, int, list[Example], bytes, bytes]], rejected: list[Rejected], totals: Totals
) -> Chunk:
    examples = [example for _, _, group, _, _ in kept for example in group]
    times = [len(group) for _, _, group, _, _ in kept]
    none = [np.zeros(0, dtype=np.int32)]
    labels = [example.labels for example in examples]
    return Chunk(
        np.concatenate([example.input_ids for example in examples] or none),
        np.concatenate(labels or none),
        np.array([len(one) for one in labels], dtype=np.int64),
        np.array([supervised_tokens(one) for one in labels], dtype=np.int64),
        *(
            np.repeat(np.array([one[column] for one in kept], dtype=kind), times)
            for column, kind in ((0, np.int64), (1, np.int64), (3, KEY), (4, KEY))
        ),
        rejected,
        totals,
    )


# ---- all chunks ----


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
        faults: takes what cannot be used.
        rejects: takes the same as lines of JSON, text included; "file" is the number of the file.

    Returns:
        The sequences, and for each file what became of its conversations.
    """
    totals = [Totals() for _ in sources]
    store = _Writer(path)
    chunks = _encoded_chunks(sources, encoder, options, workers)
    # Closing the generator ends its processes, also when writing fails half-way.
    with closing(chunks), store:
        for source, chunk in chunks:
            totals[source] += chunk.totals
            name = sources[source].name
            faults.add(Fault(f"{name}:{one.line}", one.kind, one.reason) for one in chunk.rejected)
            for one in chunk.rejected if rejects else ():
                rejects.write(_reject_line(source, one))
            store.add(source, chunk)
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


def _encoded_chunks(
    sources: list[Source], encoder: ChatEncoder, options: EncodeOptions, workers: int
) -> Iterator[tuple[int, Chunk]]:
    """(number of the file, what became of some of its records) in order, with a bar over the bytes read."""
    size = sum(source.path.stat().st_size for source in sources)
    works = (
        ((index, batch.consumed), Work(source.name, number, batch.records))
        for index, source in enumerate(sources)
        for number, batch in enumerate(read_batches(source))
    )
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None, leave=False)
    with bar, one_thread_per_process():
        if workers <= 1 or size < SMALL:
            done = ((about, encode_chunk(encoder, options, work)) for about, work in works)
        else:
            done = in_processes(works, encode_chunk, (encoder, options), workers)
        with closing(done):
            for (index, consumed), chunk in done:
                bar.update(consumed)
                yield index, chunk


def _reject_line(source: int, rejected: Rejected) -> str:
    row = {"file": source, "line": rejected.line, "reason": rejected.reason}
    try:
        row["text"] = rejected.text.decode()
    except UnicodeDecodeError:
        row["base64"] = base64.b64encode(rejected.text).decode()
    return json.dumps(row, ensure_ascii=False) + "\n"
