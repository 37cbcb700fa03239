"""A few records -> sequences: parsed, rendered, tokenized, masked, cut to length, checked and counted."""

from collections import Counter
from dataclasses import dataclass, field, fields
from hashlib import blake2b

import numpy as np

from dft.data.conversations.faults import BadLine
from dft.data.conversations.forms import Conversation, parse_conversation
from dft.data.preparing.options import EncodeOptions
from dft.data.reading.records import BOM, Record
from dft.data.sandbox.limits import OverLimit
from dft.data.templates.encoder import ChatEncoder, Example
from dft.data.templates.selfcheck import check_conversation
from dft.errors import UserError
from dft.labels import IGNORE_INDEX

CHECKED_FIRST, CHECKED = 32, 1
"""Conversations of the first, and of every other chunk of a file that the self-check looks at."""
UNTAUGHT = "the chat template renders nothing of the assistant's turns"
OVER_LIMIT = "longer than --max_length"
KEY = "S16"
"""numpy type of the digest that tells conversations apart."""


@dataclass
class Totals:
    """What became of the conversations of one file, before any selection.

    Attributes:
        read: records in the file, whatever became of them.
        rejected: records that cannot be used, by kind of fault.
        dropped: conversations without a supervised token within the length limit.
        too_long: conversations that were dropped for their length.
        truncated: conversations that were cut at the limit, or lost some of their sequences to it.
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
class Rejected:
    """A record that cannot be used.

    Attributes:
        number: of the record, from 0 within the chunk.
        line, kind, reason: where it stands and what is wrong.
        text: to be kept; None if it is not to be, or leaving the record out could lose more than this.
    """

    number: int
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

    def over_limit(self, what: str) -> UserError:
        """What to raise where the chat template takes more than it may."""
        first, last = self.records[0].line, self.records[-1].line
        place = f"{self.name}:{first}" if first == last else f"{self.name}, lines {first} to {last}"
        return UserError(
            f"{place}: the chat template {what} to render a conversation; pass another one "
            "(--chat_template), or look at what is special about the conversation"
        )


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


def encode_chunk(encoder: ChatEncoder, options: EncodeOptions, work: Work) -> Chunk:
    """Parses, renders, tokenizes, masks and truncates a few conversations, and checks a sample of them.

    Raises:
        UserError: the chat template takes more than it may, or the self-check found that a conversation is
            not supervised as it should be.
    """
    parsed = [_parse(record, options) for record in work.records]
    try:
        encoded = iter(encoder.sequences([one for one in parsed if not isinstance(one, BadLine)]))
    except OverLimit as error:
        raise work.over_limit(str(error)) from None
    kept: list[tuple[int, int, list[Example], bytes, bytes]] = []
    usable, rejected, totals = [], [], Totals(read=len(parsed))
    for number, (record, conversation) in enumerate(zip(work.records, parsed, strict=True)):
        try:
            if isinstance(conversation, BadLine):
                raise conversation
            sequences = next(encoded)
            if isinstance(sequences, BadLine):
                raise sequences
            examples = [example for _, example in sequences]
            if not any(supervised_tokens(example.labels) for example in examples):
                raise BadLine(UNTAUGHT, UNTAUGHT)
            within = [one for example in examples if (one := fit(example, options, totals))]
        except BadLine as error:
            totals.rejected[error.kind] += 1
            keep = options.keep_rejected and (record.flaw is None or record.flaw.skippable)
            text = record.text if keep else None
            rejected.append(Rejected(number, record.line, error.kind, str(error), text))
            continue
        _count(conversation, examples, within, totals, options)
        usable.append((record, sequences))
        if within:
            kept.append((number, record.line, within, *digests(examples)))
    for record, sequences in usable[: CHECKED if work.number else CHECKED_FIRST]:
        try:
            check_conversation(encoder, sequences)
        except UserError as error:
            raise UserError(f"{work.name}:{record.line}: {error}") from None
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
        raise BadLine(f"{length:,} tokens, longer than --max_length {limit}", OVER_LIMIT)
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
    if record.flaw is not None:
        return BadLine(record.flaw.reason, record.flaw.kind)
    text = record.text.rstrip(b"\r")  # or what is wrong with a line would be told of its end
    try:
        conversation = parse_conversation(text.removeprefix(BOM) if record.line == 1 else text)
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
    if within:
        totals.truncated += over
    elif over and options.truncation == "drop":
        totals.too_long += 1
    else:
        totals.dropped += 1
    for example in within:
        totals.endings.update(example.endings)


def _chunk(
    kept: list[tuple[int, int, list[Example], bytes, bytes]], rejected: list[Rejected], totals: Totals
) -> Chunk:
    examples = [example for _, _, group, _, _ in kept for example in group]
    times = [len(group) for _, _, group, _, _ in kept]
    none = [np.zeros(0, dtype=np.int32)]
    labels = np.concatenate([example.labels for example in examples] or none)
    lengths = np.array([len(example.labels) for example in examples], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    return Chunk(
        np.concatenate([example.input_ids for example in examples] or none),
        labels,
        lengths,
        np.add.reduceat(labels != IGNORE_INDEX, starts, dtype=np.int64) if examples else lengths,
        *(
            np.repeat(np.array([one[column] for one in kept], dtype=kind), times)
            for column, kind in ((0, np.int64), (1, np.int64), (3, KEY), (4, KEY))
        ),
        rejected,
        totals,
    )
