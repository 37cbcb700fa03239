"""Files that other processes may read at any moment, on disks that may be full or not ours to write."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from dft.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, parts: Iterable[str]) -> None:
    """Writes a text so that whoever opens the file finds all of it, or what was there before.

    Raises:
        OSError: `filename` is the path, also when the disk ran full while writing.
    """
    # Names of files may hold bytes that are no UTF-8; within JSON their escapes are valid.
    write_bytes_atomically(path, (part.encode("utf-8", errors="backslashreplace") for part in parts))


def write_bytes_atomically(path: Path, parts: Iterable[bytes]) -> None:
    """`write_atomically` for what is no text."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staging = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with ExitStack() as undo:
            with open(staging, "xb") as stream:
                undo.callback(os.unlink, staging)
                stream.writelines(parts)
            os.replace(staging, path)
            undo.pop_all()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems flush no folders
            raise
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def convert_write_errors(folder: Path, flag: str) -> Iterator[None]:
    """Turns what can go wrong with a folder that the user named into one `UserError`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        what = "" if error.filename in (None, str(folder)) else f"{error.filename} "
        raise UserError(f"{flag} {folder}: {what}is not a folder; remove it or name another") from None
    except OSError as error:
        if error.errno not in (*DISK_FULL, *NOT_WRITABLE, errno.EISDIR, errno.ENOENT, errno.ELOOP):
            raise
        where = error.filename or folder
        if error.errno == errno.EISDIR:
            raise UserError(
                f"{flag} {folder}: {where} is a folder where a file belongs; remove it or name another"
            ) from None
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"{flag} {folder}: no space left on the device for {where} ({free:,} bytes are free); free "
                "some or name a folder on another disk"
            ) from None
        raise UserError(
            f"{flag} {folder}: {where} cannot be written ({error.strerror}); name another folder"
        ) from None
