"""Texts of unusable records: kept on disk while their chunk is encoded, then written to rejected.jsonl."""

import base64
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from dft.data.preparing.chunk import RejectedRecord
from dft.data.reading.records import Record

TextSpans = dict[int, tuple[int, int]]
"""Offset and length of a text in the temporary file, by the index of its record within the chunk."""


class RejectedTexts:
    """Context manager that moves the texts of records with a flaw to a temporary file.

    Such texts are not parsed and may be long. On disk they are not sent to worker processes and do not stay
    in memory while their chunk is waiting.

    Args:
        folder: the folder of the temporary file.
        keep: whether the texts are needed later; otherwise they are only removed from the records.
    """

    def __init__(self, folder: Path, keep: bool) -> None:
        self.folder = folder
        self.keep = keep

    def __enter__(self) -> "RejectedTexts":
        self.file = tempfile.TemporaryFile(dir=self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def remove_from(self, records: list[Record]) -> tuple[list[Record], TextSpans]:
        """Return the records with the texts of flawed ones removed, and the locations of the stored texts."""
        spans: TextSpans = {}
        slim = list(records)
        for index, record in enumerate(records):
            if record.flaw is None or not record.text:
                continue
            slim[index] = record._replace(text=b"")
            if self.keep:
                spans[index] = (self.file.seek(0, os.SEEK_END), len(record.text))
                self.file.write(record.text)
        return slim, spans

    def restore(self, rejected: RejectedRecord, spans: TextSpans) -> RejectedRecord:
        """Return a rejected record together with its text, if the text was stored."""
        if rejected.index not in spans:
            return rejected
        start, size = spans[rejected.index]
        self.file.seek(start)
        return replace(rejected, text=self.file.read(size))


def rejected_line(source: int, record: RejectedRecord, text: bytes) -> str:
    """Return the line of rejected.jsonl for a record of the file with number `source`.

    The text is stored as "text" or, if it is not valid UTF-8, as "base64".
    """
    row = {"file": source, "line": record.line, "reason": record.reason}
    try:
        row["text"] = text.decode()
    except UnicodeDecodeError:
        row["base64"] = base64.b64encode(text).decode()
    return json.dumps(row, ensure_ascii=False) + "\n"
