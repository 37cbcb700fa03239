"""Data files, with their kind and compression according to the file name."""

import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dft.data.conversations.row_rules import NO_RULES, RowRules
from dft.errors import UserError

TEXT_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
TABLE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}
ARCHIVE = ".zip"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe datasets and hold no rows. They are skipped in folders and archives."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES_IN_WORDS = (
    ".jsonl, .ndjson, .json, .csv or .tsv (each also with .gz or .zst), .parquet, .arrow or .zip"
)


@dataclass(frozen=True)
class DataFile:
    """A file to read.

    Attributes:
        name: name to show: the path as passed, as found in a folder or as matched by a pattern; or
            "owner/name:split" for a hub dataset; or "archive.zip/member".
        path: the file on disk.
        kind: "jsonl", "json", "csv", "tsv", "parquet" or "arrow".
        compression: "gzip", "zstd" or None. Only text files are compressed.
        entry: index of the command-line value that named the file.
        rows_before: rows of earlier files with the same name (the shards of a dataset).
        member: name of the file within the zip archive at `path`, or None.
        rules: how the rows of the file are read.
    """

    name: str
    path: Path
    kind: str
    compression: str | None
    entry: int
    rows_before: int = 0
    member: str | None = None
    rules: RowRules = NO_RULES

    @property
    def size(self) -> int:
        """Bytes of the file on disk; of the compressed member, if it is in an archive."""
        if self.member is None:
            return self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(self.member).compress_size

    @contextmanager
    def open(self) -> Iterator["OpenFile"]:
        """Open the file for reading its bytes, which are decompressed only if it is in a zip archive."""
        if self.member is None:
            with open(self.path, "rb") as file:
                yield OpenFile(file, 1.0)
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
            info = archive.getinfo(self.member)
            yield OpenFile(cast(BinaryIO, member), info.compress_size / max(info.file_size, 1))


@dataclass(frozen=True)
class OpenFile:
    """An open data file.

    Attributes:
        stream: its bytes.
        ratio: bytes on disk for each byte of the stream.
    """

    stream: BinaryIO
    ratio: float

    def position(self) -> int:
        """Return how many bytes on disk have been read. For a member of an archive it is an estimate."""
        return int(self.stream.tell() * self.ratio)


def check_not_data(target: Path, label: str, sources: Iterable[DataFile]) -> None:
    """Raise `UserError` if a file that is to be written or removed is one of the data files.

    Args:
        target: the file.
        label: the flag that names it or its folder, for the error message.
        sources: the data files.
    """
    for source in sources:
        if target.exists() and source.path.exists() and target.samefile(source.path):
            raise UserError(f"{label}: {target} is a data file, which would be lost; name another")


def split_suffix(path: str) -> tuple[str, str | None] | None:
    """Return the kind and compression of a file by its name, or None if its suffix is unknown."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    elif suffix in TABLE_KINDS:
        return TABLE_KINDS[suffix], None
    kind = TEXT_KINDS.get(suffix)
    return (kind, compression) if kind else None
