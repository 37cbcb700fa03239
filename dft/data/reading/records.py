"""What a file holds before it is parsed: records of JSON text, and how large one may be."""

import math
from typing import NamedTuple

BATCH_RECORDS = 256
PIECE = 1 << 18
"""Bytes read at a time: enough to hide what a step costs, few enough to bound the arrays made of them."""
BATCH_BYTES = 4 << 20
"""Text of a batch, unless a single record has more: what a batch takes to tokenize is bounded by its text."""
MOST_TEXT = 16_000_000
"""Bytes of the longest record that is tokenized.

The tokenizer takes 150 to 350 bytes of memory for each, all at once. No context holds so many tokens.
"""
LONGEST = 256 << 20
"""Bytes of the longest record that is read, so that it can be copied to where the rejected ones go."""
BOM = b"\xef\xbb\xbf"


class Flaw(NamedTuple):
    """Why a record cannot be used.

    Attributes:
        reason: all of it, without file and line.
        kind: what it is counted under.
        skippable: whether it can be left out: nothing is lost that is not copied.
    """

    reason: str
    kind: str
    skippable: bool = True


class Record(NamedTuple):
    """One conversation as it stands in a file, not parsed yet.

    Attributes:
        line: from 1; where a conversation begins in a text file, the number of the row in a table.
        text: its JSON; from JSON Lines the whole line, verbatim but for the line feed.
        flaw: why it is not to be parsed. `text` is then what there is to be kept of it.
    """

    line: int
    text: bytes
    flaw: Flaw | None = None


class Batch(NamedTuple):
    """Up to 256 records with about 4 MiB of text, or one that is longer.

    Attributes:
        records: in the order of the file, at least one.
        consumed: bytes of the file on disk read since the batch before.
    """

    records: list[Record]
    consumed: int


NO_CONVERSATION = Flaw("there is no conversation in this file", "there is no conversation in this file")
TOO_LONG = Flaw(
    f"longer than {LONGEST >> 20} MiB, too long to be copied; take it out of the file",
    f"longer than {LONGEST >> 20} MiB",
    skippable=False,
)


def end_of_reading(reason: str, kind: str) -> Flaw:
    """A flaw behind which nothing can be read, so that it is unknown what is lost."""
    return Flaw(f"{reason}; nothing from here on can be read", kind, skippable=False)


def too_much_text(size: int) -> Flaw:
    megabytes = math.ceil(size / 100_000) / 10  # rounded up, never to a size that is allowed
    return Flaw(
        f"the conversation has {megabytes:,.1f} MB of text; at most {MOST_TEXT // 1_000_000} MB can be "
        "tokenized at once, so split it into several conversations or take it out",
        "too much text in one conversation",
    )
