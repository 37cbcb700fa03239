"""Digests of files, remembered: a file that has not changed since is not read again."""

import json
import os
import time
from hashlib import blake2b
from pathlib import Path

import xxhash
from tqdm import tqdm

from dft.data.files import write_whole

BLOCK = 1 << 22
"""Bytes read at a time."""
SETTLED = 10.0
"""Seconds a file must have been left alone before its digest is remembered.

Within the resolution of a clock a file can change twice; see "racy git".
"""
BAR_FROM = 1 << 30
"""Bytes to read from which on it takes long enough for a progress bar."""


def content_digests(paths: list[Path], cache_dir: Path) -> list[str]:
    """A digest of the content of each file.

    It is remembered in `cache_dir` together with the file's size and times. The time of the last change of
    the inode is among them, which no program can set back.
    """
    memory = cache_dir / "digests"
    known = [_recall(memory, path) for path in paths]
    unread = sum(path.stat().st_size for path, digest in zip(paths, known, strict=True) if digest is None)
    hide = None if unread >= BAR_FROM else True  # None: no bar in a log file
    with tqdm(total=unread, unit="B", unit_scale=True, desc="reading", disable=hide, leave=False) as bar:
        return [
            _digest(memory, path, bar) if digest is None else digest
            for path, digest in zip(paths, known, strict=True)
        ]


def _recall(memory: Path, path: Path) -> str | None:
    try:
        noted = json.loads(_note(memory, path).read_bytes())
    except (FileNotFoundError, ValueError):  # none, or one that a power failure has emptied
        return None
    return noted["digest"] if noted["state"] == _state(path.stat()) else None


def _digest(memory: Path, path: Path, bar: tqdm) -> str:
    before = path.stat()
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    changed = max(before.st_mtime, before.st_ctime)
    if _state(before) == _state(path.stat()) and time.time() - changed > SETTLED:
        note = {"path": str(path), "state": _state(before), "digest": digest.hexdigest()}
        write_whole(_note(memory, path), json.dumps(note))
    return digest.hexdigest()


def _note(memory: Path, path: Path) -> Path:
    return memory / f"{blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()}.json"


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
