"""Lock an output directory, so that two runs do not write into it at the same time."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from dft.console import say
from dft.errors import UserError
from dft.ranks import first_failure, is_main_process

LOCK_FILE = ".run.lock"
PATIENCE = 5.0
"""Seconds to wait for a run that is ending, such as one that was stopped to be started again."""
HELD = (errno.EACCES, errno.EAGAIN)
"""Errors of a lock that another process holds."""


def lock_output_dir(folder: Path) -> None:
    """Lock an output directory until this process ends. All ranks must call it; rank 0 holds the lock.

    The kernel releases the lock when the process ends, however it ends, so a lock that is held is that of a
    live process. Child processes close their copy of it.

    Raises:
        UserError: on all ranks, if a process of another run holds the lock.
    """
    failure = first_failure(_lock(folder) if is_main_process() else None)
    if failure is not None:
        raise UserError(failure)


def _lock(folder: Path) -> str | None:
    """Lock the directory, or return why that is not possible."""
    path = folder / LOCK_FILE
    try:
        path.touch(0o644)
        # Open for reading, so that the disk can still be made read-only. Never closed in this process.
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        return f"--output_dir {folder}: {LOCK_FILE} cannot be written ({error.strerror})"
    identity = os.fstat(handle)
    os.register_at_fork(after_in_child=lambda: _close_copy(handle, identity))
    deadline = time.monotonic() + PATIENCE
    while not _try_lock(handle, path):
        if time.monotonic() > deadline:
            return (
                f"--output_dir {folder}: another run is writing to it ({_holder(path)}); wait for it to end, "
                "stop it, or name another folder"
            )
        time.sleep(0.1)
    try:
        path.write_text(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}))
    except OSError as error:
        return f"--output_dir {folder}: {LOCK_FILE} cannot be written ({error.strerror})"
    return None


def is_locked(folder: Path) -> bool | None:
    """Return whether a run is writing to an output directory; None if that cannot be told.

    It cannot be told on file systems without locks, or if the last run was started on another machine, whose
    locks this one may not see. The lock is only tested, by sharing it for a moment; `_lock` tries again.
    """
    path = folder / LOCK_FILE
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in HELD else None
    finally:
        os.close(handle)
    return False if _machine(path) == socket.gethostname() else None


def _machine(path: Path) -> str | None:
    """Return the name of the machine that the last run was started on."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["machine"]
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        return None


def _try_lock(handle: int, path: Path) -> bool:
    """Return whether the lock was taken, or cannot be taken on this file system."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EBADF:  # network file systems lock only files that are open for writing
            writable = os.open(path, os.O_RDWR)
            os.dup2(writable, handle, inheritable=False)
            os.close(writable)
        if error.errno in (*HELD, errno.EBADF):
            return False
        say(
            f"note        {path.parent}: this file system has no locks ({error.strerror}); make sure that no "
            "other run writes to this folder"
        )
    return True


def _close_copy(handle: int, identity: os.stat_result) -> None:
    """Close the lock file in a child process, where the number may belong to another file by now."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(handle), identity):
            os.close(handle)


def _holder(path: Path) -> str:
    """Describe the process that holds a lock."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']}"
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "its process is unknown"
