"""Content digests of files. The digest of a file that has not changed is cached, so it is not read again."""

import json
import os
import time
from hashlib import blake2b
from pathlib import Path

import xxhash
from tqdm import tqdm

from dft.files import DISK_FULL, NOT_WRITABLE, write_atomically

DIGESTS = "digests"
"""Name of the folder in the cache directory that holds the cached digests."""
BLOCK = 1 << 22
"""Bytes read at a time."""
MIN_AGE = 10.0
"""Seconds since the last change of a file before its digest is cached.

Within the resolution of file timestamps a file can change twice without a visible difference; the
documentation of git calls this "racy git".
"""
PROGRESS_BAR_FROM = 1 << 30
"""Minimum number of bytes to read for which a progress bar is shown."""
SMALL = 1 << 24
"""Maximum size in bytes of files that `sampled_digest` reads completely."""
SAMPLES, SAMPLE = 128, 1 << 17
"""Number and size in bytes of the pieces that `sampled_digest` reads of a larger file."""


def content_digests(paths: list[Path], cache_dir: Path) -> list[str]:
    """Return a digest of the content of each file.

    Digests are cached in `cache_dir` together with the size and timestamps of the file, including the time of
    the last inode change (ctime), which programs cannot set back.
    """
    folder = cache_dir / DIGESTS
    cached = [_cached_digest(folder, path) for path in paths]
    unread = sum(path.stat().st_size for path, digest in zip(paths, cached, strict=True) if digest is None)
    hide = None if unread >= PROGRESS_BAR_FROM else True  # None: hidden only if stderr is not a terminal
    with tqdm(total=unread, unit="B", unit_scale=True, desc="reading", disable=hide, leave=False) as bar:
        return [
            _compute_digest(folder, path, bar) if digest is None else digest
            for path, digest in zip(paths, cached, strict=True)
        ]


def _cached_digest(folder: Path, path: Path) -> str | None:
    """Return the cached digest of a file, or None if there is none or the file has changed."""
    try:
        entry = json.loads(_entry_path(folder, path).read_bytes())
    except (FileNotFoundError, ValueError):  # ValueError: the entry was emptied by a power failure
        return None
    match entry:
        case {"state": state, "digest": str(digest)} if state == _file_state(path.stat()):
            return digest
    return None


def _compute_digest(folder: Path, path: Path, bar: tqdm) -> str:
    """Read a file and return its digest; cache the digest unless the file was modified moments ago."""
    before = path.stat()
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    changed = max(before.st_mtime, before.st_ctime)
    if _file_state(before) == _file_state(path.stat()) and time.time() - changed > MIN_AGE:
        entry = {"path": str(path), "state": _file_state(before), "digest": digest.hexdigest()}
        try:
            write_atomically(_entry_path(folder, path), [json.dumps(entry)])
        except OSError as error:
            # Without the entry the file is only read again. A read-only or full cache can still be used.
            if error.errno not in (*NOT_WRITABLE, *DISK_FULL):
                raise
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """Return a digest that takes a fraction of a second even for a file of many gigabytes.

    Only evenly spaced pieces of a large file are read, including the first and last bytes. This
    detects the usual damage to a file that was written once and has the expected size: a range of zeros or of
    other data that covers at least 1/127 of the file. It does not detect a single flipped bit.
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


def _entry_path(folder: Path, path: Path) -> Path:
    """Return the path of the cached digest of a file."""
    return folder / f"{blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()}.json"


def _file_state(stat: os.stat_result) -> list[int]:
    """Return the metadata that changes whenever the file does."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
