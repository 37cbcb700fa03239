"""What a file holds before it is parsed: records of JSON text, and how large one may be."""

from typing import NamedTuple

BATCH_RECORDS = 256
PIECE = 1 << 18
"""Bytes read at a time: enough to hide what a step costs, few enough to bound the arrays made of them."""
LONGEST = 1 << 30
"""Bytes of the longest record that is read."""
TOO_LONG = "longer than 1 GiB"
NOTHING_MORE = "nothing from here on can be read"


class Record(NamedTuple):
    """One conversation as it stands in a file, not parsed yet.

    Attributes:
        line: from 1; where a conversation begins in a text file, the number of the row in a table.
        text: its JSON, verbatim from text files, without the line end.
        fault: why it cannot be read, or why nothing can from here on; `text` is empty then.
    """

    line: int
    text: bytes
    fault: str | None = None


class Batch(NamedTuple):
    """Up to 256 records with about 4 MiB of text, or one that is longer.

    Attributes:
        records: in the order of the file, at least one.
        consumed: bytes of the file on disk read since the batch before.
    """

    records: list[Record]
    consumed: int
