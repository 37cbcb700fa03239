"""Folders of prepared data in the cache: trust, integrity, sealing and removal of abandoned ones.

Training uses the contents of the cache without further checks, so folders that another user could have
written are refused, as are links that point outside the cache.
"""

import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dft.data.preparing.digests import sampled_digest
from dft.errors import UserError
from dft.files import flush_to_disk

DATA_REPORT = "data_report.json"
CONTENTS = "contents.json"
"""Name of the file with the sizes and digests of all files in a folder, used to detect damage."""
REQUIRED = frozenset({DATA_REPORT, "train.arrow", "train.order.npy"})
"""Files that every folder of prepared data has."""
STAGING = re.compile(r"([0-9a-f]{32})\.[a-z0-9_]{8}")
"""Name of a folder that is being filled: the cache key and the suffix added by `tempfile.mkdtemp`."""
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
ABANDONED = 24 * 3600
"""Seconds without a write after which a folder that was being filled counts as abandoned.

Its lock must be free too, but some network file systems do not share locks between machines.
"""


def check_private(folder: Path, cache_dir: Path) -> None:
    """Check that only the current user can have written a folder in the cache, if it exists.

    The owner is compared with the owner of a new file in the cache, because on network file systems that may
    differ from the user id of this process.

    Raises:
        UserError: the folder is or contains a symbolic link, has other owners, or is writable by others.
    """
    try:
        status = folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        return  # a regular file is not prepared data and will be replaced
    entries = [status]
    with suppress(FileNotFoundError, NotADirectoryError):  # the link is dangling, or the folder was removed
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # another process has removed or replaced the file
                entries.append(path.lstat())
    with tempfile.TemporaryFile(dir=cache_dir) as new_file:
        owner = os.fstat(new_file.fileno()).st_uid
    where = f"--data_cache_dir {cache_dir}: {folder.name} in it"
    remedy = "remove it or choose a folder of your own"
    if any(stat.S_ISLNK(entry.st_mode) for entry in entries):
        raise UserError(f"{where} is or contains a symbolic link and is not used; {remedy}")
    other_owners = {entry.st_uid for entry in entries} - {owner}
    if other_owners:
        raise UserError(
            f"{where} belongs to another user (uid {min(other_owners)}) and is not used; {remedy}"
        )
    if status.st_mode & WRITABLE_BY_OTHERS:
        raise UserError(f"{where} can be written by other users and is not used; {remedy}")


def is_complete(folder: Path, required: Set[str] = REQUIRED) -> bool:
    """Return whether a folder holds all sealed files, as far as `sampled_digest` can detect, undamaged.

    Args:
        folder: the folder.
        required: files that it must have.
    """
    try:
        contents = json.loads((folder / CONTENTS).read_bytes())
        if not isinstance(contents, dict) or not contents.keys() >= required:
            return False
        if any(Path(name).name != name for name in contents):  # "../x" would point outside the folder
            return False
        return all(file_entry(folder / name) == entry for name, entry in contents.items())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return False


def file_entry(file: Path) -> dict[str, Any]:
    """Return the entry of a file in `CONTENTS`."""
    return {"size": file.stat().st_size, "xxh3_128": sampled_digest(file)}


def seal(folder: Path) -> None:
    """Write `CONTENTS` and flush the whole folder to disk.

    Must be called before the folder gets its final name: after a power failure a file system may have kept
    the name and lost data that was written earlier.
    """
    contents = {path.name: file_entry(path) for path in folder.iterdir()}
    (folder / CONTENTS).write_text(json.dumps(contents), encoding="utf-8")
    for path in folder.iterdir():
        flush_to_disk(path)
    flush_to_disk(folder)


def remove_abandoned(cache_dir: Path, key: str) -> None:
    """Remove folders left behind by killed processes.

    Folders of `key` are always removed, since the caller holds the lock of `key`. Folders of other keys are
    removed if their lock is free and they have not been written to for `ABANDONED` seconds.
    """
    for folder in cache_dir.iterdir():
        match = STAGING.fullmatch(folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir():
            continue
        if match[1] == key:
            shutil.rmtree(folder)
            continue
        with suppress(Timeout, OSError):  # in use, being removed by another process, or not ours to remove
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > ABANDONED:
                with FileLock(cache_dir / f"{match[1]}.lock", timeout=0):
                    shutil.rmtree(folder)
