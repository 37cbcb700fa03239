"""Only one live run writes to an output directory."""

import errno
import fcntl
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer

import pytest

from dft.errors import UserError
from dft.training.checkpoints import output_lock
from dft.training.checkpoints.output_lock import LOCK_FILE, lock_output_dir

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, pipe: Connection) -> None:
    """Lock a folder, start a child, and wait to be killed."""
    lock_output_dir(folder)
    child = os.fork()
    if child:
        pipe.send(child)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock. Its child outlives it."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(tmp_path, there))
    process.start()
    child = here.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, 9)


def test_a_live_run_is_named_and_a_killed_one_releases_its_lock(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(output_lock, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=rf"another run is writing to it \(process {holder.pid} on "):
        lock_output_dir(tmp_path)
    holder.kill()
    holder.join()
    started = time.monotonic()
    lock_output_dir(tmp_path)
    assert time.monotonic() - started < 0.1, "its child does not keep the lock"
    assert f'"process": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()


def test_a_run_that_is_ending_is_waited_for(tmp_path, holder):
    Timer(0.5, holder.kill).start()
    lock_output_dir(tmp_path)


def test_a_network_file_system_locks_a_file_open_for_writing(tmp_path, holder, monkeypatch, capsys):
    flock = fcntl.flock

    def on_network(handle: int, how: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(output_lock.fcntl, "flock", on_network)
    monkeypatch.setattr(output_lock, "PATIENCE", 0.3)
    with pytest.raises(UserError, match="another run is writing to it"):
        lock_output_dir(tmp_path)
    holder.kill()
    holder.join()
    lock_output_dir(tmp_path)
    assert "no locks" not in capsys.readouterr().out


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match=rf"{LOCK_FILE} cannot be written \(Is a directory\)"):
        lock_output_dir(tmp_path)
