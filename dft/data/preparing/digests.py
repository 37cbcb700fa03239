"""Digests of files, remembered: a file that has not changed since is not read again."""

import json
import os
import time
from hashlib import blake2b
from pathlib import Path

import xxhash
from tqdm import tqdm

from dft.files import DISK_FULL, NOT_WRITABLE, write_atomically

DIGESTS = "digests"
"""Name of the folder in the cache."""
BLOCK = 1 << 22
"""Bytes read at a time."""
SETTLED = 10.0
"""Seconds a file must have been left alone before its digest is remembered.

Within the resolution of a clock a file can change twice; see "racy git".
"""
BAR_FROM = 1 << 30
"""Bytes to read from which on it takes long enough for a progress bar."""
SMALL = 1 << 24
"""Bytes up to which a file is read as a whole by `sampled_digest`."""
SAMPLES, SAMPLE = 128, 1 << 17
"""Number and bytes of the pieces that are read of a larger one."""


def content_digests(paths: list[Path], cache_dir: Path) -> list[str]:
    """A digest of the content of each file.

    It is remembered in `cache_dir` together with the file's size and times. The time of the last change of
    the inode is among them, which no program can set back.
    """
    memory = cache_dir / DIGESTS
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
    match noted:
        case {"state": state, "digest": str(digest)} if state == _state(path.stat()):
            return digest
    return None


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
        try:
            write_atomically(_note(memory, path), [json.dumps(note)])
        except OSError as error:
            # All it would save is reading the file again. What is prepared already can be used without it.
            if error.errno not in (*NOT_WRITABLE, *DISK_FULL):
                raise
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """A digest of a file that may be many gigabytes and must be checked in a fraction of a second.

    Of a large file it reads pieces at even distances, the first and the last bytes among them, and nothing
    else. That finds what happens to files of a known size that were written once: zeros, or the bytes of
    another file, over a stretch of at least a 127th of it. It does not find a single flipped bit.
    """
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with open(path, "rb", buffering=0) as stream:
        if size <= SMALL:
            digest.update(stream.read())
        else:
            for number in range(SAMPLES):
                stream.seek(number * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def _note(memory: Path, path: Path) -> Path:
    return memory / f"{blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()}.json"


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
