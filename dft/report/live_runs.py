"""The runs below some folders, with their state at this moment."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from dft.console import clock
from dft.errors import UserError
from dft.report.log_file import LOG, read_log
from dft.report.samples_file import SAMPLES
from dft.report.saved_report import (
    CHECKPOINT,
    EMPTY_REPORT,
    RUN_REPORT,
    RUNNING,
    continued,
    find_trainer_state,
    load_report,
    read_report,
    report_from_log,
)
from dft.training.checkpoints.output_lock import LOCK_FILE, is_locked

MAX_DEPTH = 2
"""Number of levels of folders below a given one that are searched for runs."""
MAX_FOLDERS = 5000
"""Number of folders that are searched."""
FRESH = 600.0
"""Seconds since its last update in which a run counts as running if its lock cannot be tested."""
SHOWN_FILES = (RUN_REPORT, LOG, TRAINER_STATE_NAME, SAMPLES, LOCK_FILE, "model.safetensors")
"""Files of which a page is made; if none of them changes, the page does not."""


class State(Enum):
    """State of a run."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class LiveRun:
    """A run at this moment.

    Attributes:
        key: identifies the run in addresses; it is the same after a restart of the server.
        folder: its output directory.
        report: its report, as `load_report` returns it, with the state as its status.
        state: its state.
        updated: time of its last change, in seconds since 1970.
    """

    key: str
    folder: Path
    report: dict[str, Any]
    state: State
    updated: float


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the output directories of all runs in the folders and up to `MAX_DEPTH` levels below them.

    Only the first `MAX_FOLDERS` folders are searched.
    """
    searched = islice(_walk_all(folders), MAX_FOLDERS)
    return list(dict.fromkeys(path for path, is_run in searched if is_run))


def exceeds_search(folders: Sequence[Path]) -> bool:
    """Return whether there are more folders than `find_runs` searches."""
    return any(True for _ in islice(_walk_all(folders), MAX_FOLDERS, None))


def _walk_all(folders: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    return chain.from_iterable(_walk(folder, MAX_DEPTH) for folder in folders)


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """Yield folders and whether they are runs. Folders inside of runs are not searched."""
    is_run = any((folder / name).is_file() for name in (RUN_REPORT, LOG, TRAINER_STATE_NAME))
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    except OSError:  # removed meanwhile, or not readable for this user
        return
    is_run = is_run or any(CHECKPOINT.fullmatch(name) for name in names) or is_locked(folder) is True
    yield folder, is_run
    if depth and not is_run:
        for name in names:
            yield from _walk(folder / name, depth - 1)


def key_of(folder: Path) -> str:
    """Return the key of a run."""
    return hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]


def fingerprint(folder: Path) -> tuple[Any, ...]:
    """Return a value that changes when the page of a run changes."""
    stats = []
    for name in SHOWN_FILES:
        try:
            stat = (folder / name).stat()
            stats.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            stats.append((0, 0))
    locked = is_locked(folder)
    is_fresh = locked is None and time.time() - _updated(folder) < FRESH
    try:
        names = sorted(os.listdir(folder))  # checkpoints and saved files
    except OSError:
        names = []
    return str(folder), *stats, locked, is_fresh, *names


def load_run(folder: Path) -> LiveRun:
    """Return a run with its state. A run whose files cannot be read has the error as its status."""
    locked, updated = is_locked(folder), _updated(folder)
    try:
        report, state = _load(folder, locked, updated)
        report["updated"] = datetime.fromtimestamp(updated).isoformat(timespec="seconds")
    except (UserError, OSError) as error:
        state = State.UNREADABLE
        report = {**EMPTY_REPORT, "name": folder.absolute().name, "status": f"cannot be read: {error}"}
    return LiveRun(key_of(folder), folder, report, state, updated)


def _load(folder: Path, locked: bool | None, updated: float) -> tuple[dict[str, Any], State]:
    """Return the report of a run, with its status at this moment, and its state."""
    if locked:
        return _load_running(folder)
    report = load_report(folder)
    if report["status"] != RUNNING and not report["status"].startswith("unknown"):
        return report, State.ENDED
    age = time.time() - updated
    if locked is None and age < FRESH:
        return {**report, "status": "running"}, State.RUNNING
    status = "crashed or killed: it has not finished, and no process writes to its folder"
    if locked is None:
        status = f"crashed or killed: it has not finished, and had no update for {clock(age)}"
    return {**report, "status": status}, State.LOST


def _load_running(folder: Path) -> tuple[dict[str, Any], State]:
    """Return the report and the state of a run whose process is alive.

    Until training begins, the folder may still have the report and the log of an earlier run, or of the part
    before the resumption.
    """
    started = _modified(folder / LOCK_FILE)
    has_report = _modified(folder / RUN_REPORT) >= started
    has_log = _modified(folder / LOG) >= started
    if has_report:
        report = continued(read_report(folder / RUN_REPORT), read_log(folder / LOG))
        state = State.RUNNING if report["status"] == RUNNING else State.ENDED
        return report, state
    if has_log:  # --report False
        return report_from_log(folder, read_log(folder / LOG), "running"), State.RUNNING
    if (folder / RUN_REPORT).is_file() or find_trainer_state(folder) is not None:
        status = "starting; what is shown here was there before"
        return {**load_report(folder), "status": status}, State.STARTING
    return {**EMPTY_REPORT, "name": folder.absolute().name, "status": "starting"}, State.STARTING


def _updated(folder: Path) -> float:
    """Return the time of the last change of the files of a run."""
    return max(_modified(folder / name) for name in (RUN_REPORT, LOG, TRAINER_STATE_NAME, LOCK_FILE))


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
