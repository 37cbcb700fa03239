"""Lock an output directory, so that two runs do not write into it at the same time."""

import errno
import fcntl
import json
import os
import socket
import time
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
    live process. Child processes do not inherit it.

    Raises:
        UserError: on all ranks, if a process of another run holds the lock.
    """
    failure = first_failure(_lock(folder) if is_main_process() else None)
    if failure is not None:
        raise UserError(failure)


def _lock(folder: Path) -> str | None:
    """Lock the directory, or return why that is not possible."""
    try:
        # Never closed: that would release the lock.
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        return f"--output_dir {folder}: {LOCK_FILE} cannot be written ({error.strerror})"
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in HELD:
                say(
                    f"note        {folder}: this file system has no locks ({error.strerror}); make sure that "
                    "no other run writes to this folder"
                )
                return None
            if time.monotonic() > deadline:
                return (
                    f"--output_dir {folder}: another run is writing to it ({_holder(handle)}); wait for it "
                    "to end, stop it, or name another folder"
                )
        time.sleep(0.1)
    holder = json.dumps({"process": os.getpid(), "machine": socket.gethostname()})
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, holder.encode(), 0)
    except OSError as error:
        return f"--output_dir {folder}: {LOCK_FILE} cannot be written ({error.strerror})"
    return None


def _holder(handle: int) -> str:
    """Describe the process that holds a lock."""
    try:
        holder = json.loads(os.pread(handle, 1000, 0))
        return f"process {holder['process']} on {holder['machine']}"
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "its process is unknown"
