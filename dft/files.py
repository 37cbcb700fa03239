"""Write files that other processes may read at any time and report disk and permission errors."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from dft.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
REPORT_PICTURE = "report.png"
"""Name of the file with the main figures of a run, in its output directory and next to its model card."""


def write_atomically(path: Path, parts: Iterable[str]) -> None:
    """Write a text file so that readers see either all of it or the previous file.

    Args:
        path: file to write; missing parent folders are created.
        parts: text, in pieces.

    Raises:
        OSError: the file cannot be written. Its `filename` is the path, even if the disk is full.
    """
    # File names may contain bytes that are not UTF-8; their escapes are valid in JSON.
    write_bytes_atomically(path, (part.encode("utf-8", errors="backslashreplace") for part in parts))


def write_bytes_atomically(path: Path, parts: Iterable[bytes]) -> None:
    """Write a binary file like `write_atomically`."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staging = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with ExitStack() as cleanup:
            with open(staging, "xb") as stream:
                cleanup.callback(os.unlink, staging)
                stream.writelines(parts)
            os.replace(staging, path)
            cleanup.pop_all()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder. The folder need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def convert_write_errors(folder: Path, flag: str) -> Iterator[None]:
    """Convert errors of writing into a folder to `UserError`.

    Args:
        folder: folder that the user named.
        flag: flag that names it, for the message.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        name = "" if error.filename in (None, str(folder)) else f"{error.filename} "
        raise UserError(f"{flag} {folder}: {name}is not a folder; remove it or name another") from None
    except OSError as error:
        if error.errno not in (*DISK_FULL, *NOT_WRITABLE, errno.EISDIR, errno.ENOENT, errno.ELOOP):
            raise
        path = error.filename or folder
        if error.errno == errno.EISDIR:
            raise UserError(
                f"{flag} {folder}: {path} is a folder where a file belongs; remove it or name another"
            ) from None
        if error.errno in DISK_FULL:
            free = free_bytes(folder)
            raise UserError(
                f"{flag} {folder}: no space left on the device for {path} ({free:,} bytes are free); free "
                "some or name a folder on another disk"
            ) from None
        raise UserError(
            f"{flag} {folder}: {path} cannot be written ({error.strerror}); name another folder"
        ) from None
