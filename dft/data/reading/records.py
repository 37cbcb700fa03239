"""Records (the JSON text of one conversation each), batches of them, and limits on their size."""

import math
from typing import NamedTuple

MAX_BATCH_RECORDS = 256
MAX_BATCH_BYTES = 4 << 20
"""Maximum bytes of text in a batch of several records. Bounds the memory needed to tokenize a batch."""
READ_SIZE = 1 << 18
"""Bytes per read: enough to hide its overhead, few enough to bound the size of the arrays made of them."""
MAX_TEXT_BYTES = 16_000_000
"""Maximum size in bytes of a record that is tokenized.

The tokenizer takes 150 to 350 bytes of memory for each byte of a text. No model has a context that long.
"""
MAX_RECORD_BYTES = 256 << 20
"""Maximum size in bytes of a record that is read and can be copied to rejected.jsonl."""
BOM = b"\xef\xbb\xbf"


class Flaw(NamedTuple):
    """Reason why a record cannot be used.

    Attributes:
        reason: the full reason, without file and line.
        kind: category that the reason is counted under.
        skippable: whether the record can be skipped without losing more than its own text.
    """

    reason: str
    kind: str
    skippable: bool = True


class Record(NamedTuple):
    """The unparsed text of one conversation.

    Attributes:
        line: line on which the conversation begins, or row number of a table. Counted from 1.
        text: JSON text. For JSON Lines this is the whole line, verbatim except for the line feed.
        flaw: reason not to parse the record; in that case `text` is the part of it to keep.
    """

    line: int
    text: bytes
    flaw: Flaw | None = None


class Batch(NamedTuple):
    """Consecutive records with at most `MAX_BATCH_BYTES` of text, or a single longer record.

    Attributes:
        records: 1 to `MAX_BATCH_RECORDS` records, in the order of the file.
        consumed: bytes of the file on disk that were read since the previous batch.
        unread: number of values of columns that were not read at all, since the previous batch.
    """

    records: list[Record]
    consumed: int
    unread: dict[str, int] = {}


NO_CONVERSATION = Flaw("there is no conversation in this file", "there is no conversation in this file")
RECORD_TOO_LONG = Flaw(
    f"longer than {MAX_RECORD_BYTES >> 20} MiB, too long to be copied; take it out of the file",
    f"longer than {MAX_RECORD_BYTES >> 20} MiB",
    skippable=False,
)


def unreadable_from_here(reason: str, kind: str) -> Flaw:
    """Return a flaw after which the rest of the file is unreadable, so the extent of the loss is unknown."""
    return Flaw(f"{reason}; the rest of the file cannot be read", kind, skippable=False)


def too_much_text(size: int) -> Flaw:
    """Return the flaw of a record of more than `MAX_TEXT_BYTES`."""
    megabytes = math.ceil(size / 100_000) / 10  # rounded up, so that it never looks allowed
    return Flaw(
        f"the conversation has {megabytes:,.1f} MB of text; at most {MAX_TEXT_BYTES // 1_000_000} MB can be "
        "tokenized at once, so split it into several conversations or take it out",
        "too much text in one conversation",
    )
