"""Handle disks that are full, read-only or unavailable."""

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

WEIGHT_FILE = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Pattern of the file names that `save_pretrained` writes weights to."""


def sees_the_same(folder: Path, accelerator: Accelerator) -> bool:
    """Return whether a folder is on a disk that this rank shares with rank 0. All ranks must call it.

    Rank 0 creates a file with a new name, since a network file system may cache for half a minute whether a
    name exists.
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
    """Convert a failed save to one error and remove its partial files to free disk space.

    Args:
        run: the output directory.
        staging: the folder that is being written.

    Raises:
        UserError: the disk is full or no longer writable.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_fault(error, run)
        if reason is None:
            raise
        shutil.rmtree(staging, ignore_errors=True)  # nothing more can be done if removal fails too
        raise UserError(
            f"--output_dir {run}: {staging.name.removeprefix(UNFINISHED)} cannot be saved: {reason}; earlier "
            "checkpoints are unchanged, and --resume_from_checkpoint auto resumes from the newest"
        ) from None


def disk_fault(error: Exception, folder: Path) -> str | None:
    """Return the disk fault that an error reports; None if the error has another cause.

    torch and safetensors report failed writes with their own messages.
    """
    words = str(error)
    code, filename = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if isinstance(error, FileNotFoundError) and not folder.is_dir():
        return f"{folder} no longer exists"
    if code in DISK_FULL or "No space left" in words or "Disk quota exceeded" in words:
        return f"no space left on the device ({free_bytes(folder):,} bytes are free)"
    if code in (*NOT_WRITABLE, errno.EIO, errno.ESTALE):
        return f"{os.strerror(code)}: {filename or folder}"
    if "PytorchStreamWriter" in words or "I/O error" in words:
        return f"{' '.join(words.split())} ({free_bytes(folder):,} bytes are free)"
    return None


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another one, each atomically, after all of them are on disk.

    Weight files in the target that are not replaced are removed: otherwise the files of an earlier model,
    which may be sharded differently, could be loaded instead of the new ones.
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
        if WEIGHT_FILE.fullmatch(path.name) and path.name not in moved and path.is_file():
            path.unlink()
    shutil.rmtree(source)
    flush_to_disk(target)
