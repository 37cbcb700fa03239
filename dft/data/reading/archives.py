"""Data files in zip archives."""

import zipfile
from pathlib import Path

from dft.data.reading.data_file import (
    ARCHIVE,
    DESCRIPTIONS,
    SUFFIXES_IN_WORDS,
    TABLE_KINDS,
    DataFile,
    split_suffix,
)
from dft.errors import UserError

ENCRYPTED = 1
"""Bit of `ZipInfo.flag_bits` that marks an encrypted member."""


def zip_members(path: str, entry: int, label: str) -> list[DataFile]:
    """Return the data files of a zip archive, sorted by name, without hidden ones.

    Raises:
        UserError: the archive is damaged or encrypted, holds another archive or a table, or no data file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda info: info.filename)
    except zipfile.BadZipFile as error:
        raise UserError(f"{label}: is not a zip archive, or a damaged one ({error})") from None
    files = []
    for info in members:
        suffix = split_suffix(info.filename)
        parts = info.filename.split("/")
        if info.is_dir() or parts[-1] in DESCRIPTIONS:
            continue
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        is_archive = info.filename.lower().endswith(ARCHIVE)
        if suffix is None and not is_archive:
            continue
        kind, compression = suffix or (ARCHIVE, None)
        if is_archive or kind in TABLE_KINDS.values():
            raise UserError(
                f"{label}: holds {info.filename}, which can only be read outside of an archive; extract it"
            )
        if info.flag_bits & ENCRYPTED:
            raise UserError(f"{label}: {info.filename} in it is encrypted; extract it with its password")
        name = f"{path}/{info.filename}"
        files.append(DataFile(name, Path(path), kind, compression, entry, member=info.filename))
    if not files:
        raise UserError(f"{label}: is an archive that holds no file ending in {SUFFIXES_IN_WORDS}")
    return files
