"""Folders of prepared data: whether one is ours and whole, how it becomes that, what killed runs leave.

What is in the cache is trained on without a second look, so nothing is taken that another user may have
written, and nothing is followed that leads out of it.
"""

import json
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dft.data.preparing.digests import sampled_digest
from dft.errors import UserError
from dft.files import flush_to_disk

REPORT = "data_report.json"
CONTENTS = "contents.json"
"""Sizes and digests of the files of a prepared folder: what a disk or a person did to them must be seen."""
EACH_HAS = {REPORT, "train.arrow", "train.order.npy"}
"""Files that no prepared folder is without."""
STAGING = re.compile(r"([0-9a-f]{32})\.[a-z0-9_]{8}")
"""Name of a folder that is being filled: the key of the data, and what `tempfile.mkdtemp` adds."""
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
ABANDONED = 24 * 3600
"""Seconds without a write after which one of these is left over.

Its lock is free then too, but between the machines of a cluster not every file system keeps locks.
"""


def check_private(folder: Path, cache_dir: Path) -> None:
    """Raises `UserError` for a folder in the cache that others may have written; not where there is none.

    Whose it is, is compared with what this process writes there: on network file systems the owner of a
    file may not be the user who wrote it.
    """
    try:
        found = [one.lstat() for one in (folder, *folder.iterdir())]
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_symlink():
            return
        found = []
    with tempfile.TemporaryFile(dir=cache_dir) as mine:
        owner = os.fstat(mine.fileno()).st_uid
    told = f"--data_cache_dir {cache_dir}: {folder.name} there"
    remedy = "remove it, or name a folder of your own"
    if folder.is_symlink() or any(stat.S_ISLNK(one.st_mode) for one in found):
        raise UserError(f"{told} is or holds a symbolic link, and is not used; {remedy}")
    others = {one.st_uid for one in found} - {owner}
    if others:
        raise UserError(f"{told} belongs to another user (uid {min(others)}), and is not used; {remedy}")
    if found[0].st_mode & WRITABLE_BY_OTHERS:
        raise UserError(f"{told} can be written by other users, and is not used; {remedy}")


def is_whole(target: Path) -> bool:
    """Whether everything in it is as it was written, as far as `sampled_digest` sees."""
    try:
        contents = json.loads((target / CONTENTS).read_bytes())
        if not isinstance(contents, dict) or not contents.keys() >= EACH_HAS:
            return False
        if any(Path(name).name != name for name in contents):  # ".." leads out of the folder
            return False
        return all(_entry(target / name) == entry for name, entry in contents.items())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return False


def _entry(file: Path) -> dict[str, Any]:
    """What `CONTENTS` says of a file."""
    return {"size": file.stat().st_size, "xxh3_128": sampled_digest(file)}


def seal(folder: Path) -> None:
    """Writes `CONTENTS`, and waits until all of the folder would survive a loss of power.

    Only then it may get its name: a file system may keep the name and lose what was written before it.
    """
    contents = {one.name: _entry(one) for one in folder.iterdir()}
    (folder / CONTENTS).write_text(json.dumps(contents), encoding="utf-8")
    for one in folder.iterdir():
        flush_to_disk(one)
    flush_to_disk(folder)


def remove_abandoned(cache_dir: Path, key: str) -> None:
    """Removes what killed preparations left, of this key and of others.

    The lock of `key` is ours, so nobody else fills a folder of it.
    """
    for folder in cache_dir.iterdir():
        found = STAGING.fullmatch(folder.name)
        if found is None or folder.is_symlink() or not folder.is_dir():
            continue
        if found[1] == key:
            shutil.rmtree(folder)
            continue
        with suppress(Timeout, OSError):  # someone fills it, ends it, or owns it: not this run's business
            if time.time() - max(one.stat().st_mtime for one in (folder, *folder.iterdir())) > ABANDONED:
                with FileLock(cache_dir / f"{found[1]}.lock", timeout=0):
                    shutil.rmtree(folder)
