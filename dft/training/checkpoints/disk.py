"""Writing to disks that may be full, read-only or gone."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from dft.errors import UserError
from dft.files import DISK_FULL, NOT_WRITABLE, flush_to_disk, free_bytes
from dft.training.checkpoints.folder import UNFINISHED

WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of files that `save_pretrained` writes weights to."""


def sees_the_same(folder: Path, accelerator: Accelerator) -> bool:
    """Whether a folder is on a disk that this rank shares with rank 0. A collective.

    Asked by the name of a file that nobody has asked for yet: what a network file system remembers of names
    may be half a minute old.
    """
    name = broadcast_object_list([uuid.uuid4().hex])[0]
    mark = folder / f".seen-{name}"
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    seen = mark.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark.unlink()
    return seen


@contextmanager
def writing_a_save(run: Path, staging: Path) -> Iterator[None]:
    """A save that fails is one error, and leaves no half of itself on a disk that is full.

    Raises:
        UserError: the disk is full, or cannot be written to any more.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_fault(error, run)
        if reason is None:
            raise
        shutil.rmtree(staging, ignore_errors=True)  # where it cannot be removed either, there is no remedy
        raise UserError(
            f"--output_dir {run}: {staging.name.removeprefix(UNFINISHED)} cannot be saved: {reason}; earlier "
            "checkpoints are as they were, and --resume_from_checkpoint auto goes on from the newest"
        ) from None


def disk_fault(error: Exception, folder: Path) -> str | None:
    """What an error says about the disk that a folder is on; None if it is about something else.

    torch and safetensors report a failed write in words of their own.
    """
    code = error.errno if isinstance(error, OSError) else None
    words = str(error)
    if isinstance(error, FileNotFoundError) and not folder.is_dir():
        return f"{folder} is gone"
    if code in DISK_FULL or "No space left" in words or "Disk quota exceeded" in words:
        return f"no space left on the device ({free_bytes(folder):,} bytes are free)"
    if code in (*NOT_WRITABLE, errno.EIO, errno.ESTALE, errno.EFBIG):
        return f"{error.strerror}: {error.filename or folder}"
    if "PytorchStreamWriter" in words or "I/O error" in words:
        return f"{' '.join(words.split())} ({free_bytes(folder):,} bytes are free)"
    return None


def move_files(source: Path, target: Path) -> None:
    """Moves all files of a folder into another, each in one step, after all of them are on disk.

    Weights that are there and have no successor go: those of an earlier model, which may be cut into other
    files, would be loaded in place of the new ones.
    """
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in paths:
        flush_to_disk(path)
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    moved = {path.name for path in paths}
    for path in target.iterdir():
        if WEIGHTS.fullmatch(path.name) and path.name not in moved and path.is_file():
            path.unlink()
    shutil.rmtree(source)
    flush_to_disk(target)
