"""Base scores on disk: shards while they are computed, one sealed file when they are complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from dft.data.preparing.cache import check_private, is_complete, remove_abandoned, seal
from dft.errors import UserError
from dft.files import convert_write_errors, flush_to_disk, free_bytes, write_bytes_atomically

SCORES, ABOUT = "logp.f32", "about.json"
"""Files of complete scores: one float32 per target, and what they belong to."""
DIGEST_BYTES = 16
BYTES_PER_TARGET = 4


class ScoreStore:
    """The scores of a dataset in the cache.

    A run that is killed leaves the shards that it has completed, and the next one continues after them.

    Args:
        cache_dir: value of --data_cache_dir. The scores are in a folder `base_scores` of it.
        key: `scores_key`.
    """

    def __init__(self, cache_dir: Path, key: str) -> None:
        self.cache_dir = cache_dir
        self.key = key
        self.folder = cache_dir / "base_scores" / key
        self._shards = self.folder.with_name(f"{key}.shards")

    @property
    def path(self) -> Path:
        """The file of the scores."""
        return self.folder / SCORES

    def prepare(self) -> None:
        """Create the folder for shards, unless the scores are complete.

        Raises:
            UserError: it cannot be written, or can be written by other users.
        """
        with self._errors():
            self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.folder, self._shards):
                check_private(folder, self.cache_dir)
            if not self.is_complete():
                self._shards.mkdir(exist_ok=True, mode=0o700)

    def is_complete(self) -> bool:
        """Return whether all scores are stored and undamaged."""
        return is_complete(self.folder, {SCORES, ABOUT})

    def about(self) -> dict[str, Any]:
        """Return what was recorded with complete scores."""
        return json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))

    def check_space(self, targets: int) -> None:
        """Raise `UserError` if the disk has no room for the shards and the final file."""
        needed, free = 2 * BYTES_PER_TARGET * targets, free_bytes(self.cache_dir)
        if needed > free:
            raise UserError(
                f"--base_scores True: the scores of {targets:,} supervised tokens take {needed / 2**20:,.0f} "
                f"MiB while they are computed, and --data_cache_dir {self.cache_dir} has "
                f"{free / 2**20:,.0f} MiB free; free some space or name a folder on another disk"
            )

    def shards(self, counts: list[int]) -> list[int]:
        """Return the numbers of the complete shards.

        Args:
            counts: number of targets of each shard.
        """
        return [number for number, count in enumerate(counts) if self._read(number, count) is not None]

    def write_shard(self, number: int, scores: np.ndarray) -> None:
        """Store the scores of a shard, (targets,) float32, atomically."""
        data = scores.astype(np.float32).tobytes()
        with self._errors():
            write_bytes_atomically(self._shard(number), [data, xxhash.xxh3_128_digest(data)])

    def complete(self, counts: list[int], about: dict[str, Any]) -> None:
        """Join all shards to the final file, and remove them.

        Args:
            counts: number of targets of each shard.
            about: what to record with the scores.
        """
        with self._errors(), FileLock(f"{self.folder}.lock"):
            if not self.is_complete():
                remove_abandoned(self.folder.parent, self.key)
                shutil.rmtree(self.folder, ignore_errors=True)  # damaged
                staging = Path(tempfile.mkdtemp(prefix=f"{self.key}.", dir=self.folder.parent))
                with open(staging / SCORES, "wb") as stream:
                    for number, count in enumerate(counts):
                        data = self._read(number, count)
                        assert data is not None, "every shard was written"
                        stream.write(data)
                (staging / ABOUT).write_text(json.dumps(about), encoding="utf-8")
                seal(staging)
                os.rename(staging, self.folder)
                flush_to_disk(self.folder.parent)
            shutil.rmtree(self._shards, ignore_errors=True)

    def _shard(self, number: int) -> Path:
        return self._shards / f"{number:05}"

    def _read(self, number: int, count: int) -> bytes | None:
        """Return the bytes of the scores of a shard; None if it is missing, damaged or of another size."""
        try:
            stored = self._shard(number).read_bytes()
        except FileNotFoundError:
            return None
        data, digest = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
        is_whole = len(data) == BYTES_PER_TARGET * count and xxhash.xxh3_128_digest(data) == digest
        return data if is_whole else None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with convert_write_errors(self.cache_dir, "--data_cache_dir"):
            yield
