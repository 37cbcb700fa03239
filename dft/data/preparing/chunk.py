"""Encoding of a chunk of records: parse, render, tokenize, mask, truncate, check and count."""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import NO_RULES, RowLeftOut, RowRules
from dft.data.preparing.conversation_counts import ConversationCounts
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.traits import traits_of
from dft.data.preparing.truncation import count_supervised, truncate
from dft.data.reading.records import BOM, Record
from dft.data.sandbox.limits import LimitExceeded
from dft.data.templates.encoder import SEPARATE_TOKENS, ChatEncoder, Example
from dft.data.templates.rendering import Rendering
from dft.data.templates.selfcheck import check_conversation
from dft.errors import UserError
from dft.labels import IGNORE_INDEX

CHECKED_IN_FIRST_CHUNK, CHECKED_PER_CHUNK = 32, 1
"""Number of conversations that the self-check examines in a file's first chunk and in each later one."""
NOTHING_RENDERED = "the chat template renders nothing of the assistant's turns"
DIGEST_DTYPE = "S16"
"""numpy type of the digests that identify conversations."""


@dataclass(frozen=True)
class RejectedRecord:
    """An unusable record.

    Attributes:
        index: index of the record within the chunk.
        line: line number, or row number of a table.
        kind: category that the reason is counted under.
        reason: the full reason, without file and line.
        text: text to save in rejected.jsonl. None if rejected records are an error, or if skipping this one
            could lose more than its own text.
    """

    index: int
    line: int
    kind: str
    reason: str
    text: bytes | None


@dataclass(frozen=True)
class RecordChunk:
    """Consecutive records of a data file, to be encoded together.

    Attributes:
        file: name of the file, for error messages.
        number: number of the chunk within the file, from 0.
        records: the records, at least one.
        rules: how the rows of the file are read.
        unread: number of values of columns that are not in the records.
    """

    file: str
    number: int
    records: list[Record]
    rules: RowRules = NO_RULES
    unread: dict[str, int] = field(default_factory=dict)

    def limit_error(self, excess: str) -> UserError:
        """Return the error to raise when rendering exceeds a limit; `excess` names the limit."""
        first, last = self.records[0].line, self.records[-1].line
        place = f"{self.file}:{first}" if first == last else f"{self.file}, lines {first} to {last}"
        return UserError(
            f"{place}: the chat template {excess} to render a conversation; pass another template "
            "(--chat_template) or check what is unusual about the conversation"
        )


@dataclass(frozen=True)
class EncodedChunk:
    """The sequences of a chunk of records.

    Attributes:
        input_ids, labels: (tokens,) int32, all sequences concatenated.
        lengths: (sequences,) int64, tokens of each sequence.
        supervised: (sequences,) int64, supervised tokens of each sequence.
        conversations: (sequences,) int64, index of the record within the chunk.
        lines: (sequences,) int64, line number of the record.
        parts: (sequences,) int32, index of each sequence in its conversation.
        reasons: for each sequence why it does not continue the previous one of its conversation, or "".
        loss_weights: for each sequence the weight of each of its tokens, (tokens,) float32, or None if all
            are 1.
        token_digests: (sequences,) digest of the token ids of the whole conversation.
        label_digests: (sequences,) digest of its token ids, labels and weights.
        traits: (sequences,) traits of the conversation, see `dft.data.preparing.traits`.
        rejected: the unusable records.
        counts: counts of what happened to the records.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    conversations: np.ndarray
    lines: np.ndarray
    parts: np.ndarray
    reasons: list[str]
    loss_weights: list[np.ndarray | None]
    token_digests: np.ndarray
    label_digests: np.ndarray
    traits: np.ndarray
    rejected: list[RejectedRecord]
    counts: ConversationCounts


class _EncodedConversation(NamedTuple):
    """A conversation of which at least one sequence is left after truncation; see `EncodedChunk`."""

    record_index: int
    line: int
    examples: list[Example]
    reasons: list[str]
    token_digest: bytes
    label_digest: bytes


def encode_chunk(encoder: ChatEncoder, options: PrepareOptions, chunk: RecordChunk) -> EncodedChunk:
    """Parse, render, tokenize, mask and truncate the conversations of a chunk, and self-check a sample.

    Raises:
        UserError: the chat template exceeds a limit of `dft.data.sandbox.limits`, or the self-check found a
            conversation whose supervision is wrong.
    """
    parsed = [_parse(record, chunk.rules, options) for record in chunk.records]
    try:
        encoded = iter(encoder.sequences([item for item in parsed if isinstance(item, Conversation)]))
    except LimitExceeded as error:
        raise chunk.limit_error(str(error)) from None
    conversations: list[_EncodedConversation] = []
    described: list[tuple[Conversation, list[Example]]] = []
    usable, rejected, counts = [], [], _count_columns(chunk, parsed)
    for index, (record, conversation) in enumerate(zip(chunk.records, parsed, strict=True)):
        if isinstance(conversation, RowLeftOut):
            continue
        try:
            if isinstance(conversation, BadLine):
                raise conversation
            sequences = next(encoded)
            if isinstance(sequences, BadLine):
                raise sequences
            examples = [example for _, example in sequences]
            if not any(count_supervised(example.labels) for example in examples):
                raise BadLine(NOTHING_RENDERED, NOTHING_RENDERED)
            truncated = [truncate(example, options, counts) for example in examples]
        except BadLine as error:
            counts.rejected[error.kind] += 1
            rejected.append(_reject(index, record, error, options))
            continue
        remaining = [example for example in truncated if example is not None]
        reasons = [
            reason
            for reason, example in zip(_reasons(sequences), truncated, strict=True)
            if example is not None
        ]
        _count(conversation, examples, remaining, counts, options)
        for rendering, _ in sequences:
            counts.add_remarks(rendering.remarks, f"{chunk.file}:{record.line}")
        usable.append((record, sequences))
        if remaining:
            digests = _conversation_digests(examples)
            conversations.append(_EncodedConversation(index, record.line, remaining, reasons, *digests))
            described.append((conversation, examples))
    for record, sequences in usable[: CHECKED_PER_CHUNK if chunk.number else CHECKED_IN_FIRST_CHUNK]:
        try:
            check_conversation(encoder, sequences)
        except UserError as error:
            raise UserError(f"{chunk.file}:{record.line}: {error}") from None
    traits = traits_of(described, encoder.special_tokens)
    result = _concatenate(conversations, traits, rejected, counts)
    if encoder.text_tokenizer.unknown_ids:
        counts.unknown = int(np.isin(result.input_ids, [*encoder.text_tokenizer.unknown_ids]).sum())
    return result


def _parse(record: Record, rules: RowRules, options: PrepareOptions) -> Conversation | BadLine | RowLeftOut:
    """Return the conversation of a record, or the reason why it has none that is used."""
    if record.flaw is not None:
        return BadLine(record.flaw.reason, record.flaw.kind)
    text = record.text.rstrip(b"\r")  # otherwise JSON errors would point at the end of the line
    try:
        conversation = parse_conversation(text.removeprefix(BOM) if record.line == 1 else text, rules)
    except (BadLine, RowLeftOut) as error:
        return error
    return conversation.last_turn_only() if options.train_on_last_turn_only else conversation


def _count_columns(
    chunk: RecordChunk, parsed: list[Conversation | BadLine | RowLeftOut]
) -> ConversationCounts:
    """Return counts of the records, of those left out, and of the columns that are not read."""
    counts = ConversationCounts(read=len(parsed), unread=Counter(chunk.unread))
    counts.named.update(
        {column: max(count, 1) for column, count in chunk.unread.items() if column in chunk.rules.named}
    )
    for item in parsed:
        if isinstance(item, Conversation):
            if item.unread or item.named:
                counts.unread.update(item.unread)
                counts.named.update(item.named)
        elif isinstance(item, RowLeftOut):
            counts.left_out[str(item)] += 1
            counts.named.update(chunk.rules.kept_columns)
    return counts


def _reject(index: int, record: Record, error: BadLine, options: PrepareOptions) -> RejectedRecord:
    """Return a rejected record, including its text if it is to be saved."""
    keep = options.keep_rejected and (record.flaw is None or record.flaw.skippable)
    return RejectedRecord(index, record.line, error.kind, str(error), record.text if keep else None)


def _reasons(sequences: list[tuple[Rendering, Example]]) -> list[str]:
    """Return for each sequence of a conversation why it does not continue the previous one."""
    return [
        rendering.reason if number == 0 or (rendering.reason and not rendering.in_pieces) else SEPARATE_TOKENS
        for number, (rendering, _) in enumerate(sequences)
    ]


def _count(
    conversation: Conversation,
    examples: list[Example],
    remaining: list[Example],
    counts: ConversationCounts,
    options: PrepareOptions,
) -> None:
    """Count a usable conversation, given its sequences before and after truncation."""
    counts.roles.update(message["role"] for message in conversation.messages)
    counts.turns[len(conversation.messages)] += 1
    over = any(len(example.input_ids) > options.max_length for example in examples)
    if remaining:
        counts.truncated += over
    elif over and options.truncation == "drop":
        counts.too_long += 1
    else:
        counts.dropped += 1
    for example in remaining:
        counts.endings.update(example.endings)


def _conversation_digests(examples: list[Example]) -> tuple[bytes, bytes]:
    """Return a digest of the token ids of a conversation, and one of its token ids, labels and weights."""
    tokens = blake2b(digest_size=np.dtype(DIGEST_DTYPE).itemsize)
    for example in examples:
        tokens.update(len(example.input_ids).to_bytes(8, "little") + example.input_ids.tobytes())
    labels = tokens.copy()
    for example in examples:
        labels.update(example.labels.tobytes())
        if example.loss_weights is not None:
            labels.update(example.loss_weights.tobytes())
    return tokens.digest(), labels.digest()


def _concatenate(
    conversations: list[_EncodedConversation],
    traits: np.ndarray,
    rejected: list[RejectedRecord],
    counts: ConversationCounts,
) -> EncodedChunk:
    """Concatenate the sequences of all conversations of a chunk."""
    examples = [example for conversation in conversations for example in conversation.examples]
    repeats = [len(conversation.examples) for conversation in conversations]
    empty = [np.zeros(0, dtype=np.int32)]
    labels = np.concatenate([example.labels for example in examples] or empty)
    lengths = np.array([len(example.labels) for example in examples], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths

    def per_sequence(values: list[int] | list[bytes], dtype: type | str) -> np.ndarray:
        return np.repeat(np.array(values, dtype=dtype), repeats)

    return EncodedChunk(
        np.concatenate([example.input_ids for example in examples] or empty),
        labels,
        lengths,
        np.add.reduceat(labels != IGNORE_INDEX, starts, dtype=np.int64) if examples else lengths,
        per_sequence([item.record_index for item in conversations], np.int64),
        per_sequence([item.line for item in conversations], np.int64),
        np.concatenate([np.arange(count, dtype=np.int32) for count in repeats] or empty),
        [reason for item in conversations for reason in item.reasons],
        [example.loss_weights for example in examples],
        per_sequence([item.token_digest for item in conversations], DIGEST_DTYPE),
        per_sequence([item.label_digest for item in conversations], DIGEST_DTYPE),
        np.repeat(traits, repeats),
        rejected,
        counts,
    )
