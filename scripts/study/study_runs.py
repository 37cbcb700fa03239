"""Run scripts in processes forked from one that has already imported the libraries.

The study fine-tunes more than a hundred models, each in ten seconds or so; importing the libraries would add
several seconds to each.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError
from dft.files import convert_write_errors, write_atomically
from scripts.study.study_task import file_name

SELECTION_SEED = -1
"""Seed of the runs that select learning rates."""
RECORD, LOCK = "size.json", ".lock"
"""Files in the folder of a study: what is studied, and the lock of the process that writes to the folder."""
SETTINGS = {"TOKENIZERS_PARALLELISM": "false"}
"""Environment variables of the scripts."""
CPU_SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Further ones where they run on the CPU, several at a time."""
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    "dft.fine_tune",
    "train_dft",
    "evaluate",
    "scripts.study.study_results",
    "scripts.study.study_task",
]


class Run(NamedTuple):
    """A fine-tuning run. Its fields are keys of study.json."""

    method: str
    data: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Name of its folder."""
        return file_name(f"{self.method}-{self.data}-{self.seed}-{self.rate:g}")


@contextmanager
def claim_folder(folder: Path, description: Mapping[str, Any]) -> Iterator[None]:
    """Lock the folder of a study, and record what is studied, so that another study cannot reuse its results.

    Raises:
        UserError: the folder holds anything other than this study, another process writes to it, or it cannot
            be written.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {RECORD, LOCK}:
        raise UserError(f"{folder}: holds something else than a study; name another folder")
    lock = FileLock(folder / LOCK)
    with convert_write_errors(folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder}: another process is running a study in it; wait for it to end, or name another "
                "folder"
            ) from None
    with held:
        expected = json.loads(json.dumps(description))  # with lists instead of tuples, as in the record
        if (folder / RECORD).is_file():
            recorded = read_result(folder / RECORD)
            different = [key for key, value in expected.items() if recorded.get(key) != value]
            if different:
                raise UserError(
                    f"{folder}: holds a study with other settings ({', '.join(different)}); name another "
                    "folder"
                )
        with convert_write_errors(folder, "folder"):
            write_atomically(folder / RECORD, [json.dumps(description)])
        yield


def read_result(file: Path, *keys: str) -> dict[str, Any]:
    """Return the content of a JSON file that a study has written.

    Args:
        file: the file.
        keys: keys that the object in it must have.

    Raises:
        UserError: the file is damaged.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is damaged ({error}); remove it to compute it again") from None
    if not isinstance(result, dict) or not result.keys() >= set(keys):
        raise UserError(f"{file}: is damaged (not an object with all keys); remove it to compute it again")
    return result


def prepare(cpu: bool = True) -> None:
    """Set environment variables, also for this process. Must be called before the first `run_script`.

    Args:
        cpu: whether the scripts run on the CPU.
    """
    required = [str(ROOT), str(ROOT / "scripts")]  # to import the preloaded modules
    others = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *required)
    ]
    os.environ.update(SETTINGS | (CPU_SETTINGS if cpu else {}), PYTHONPATH=os.pathsep.join(required + others))
    FORKS.set_forkserver_preload(PRELOADED)


def run_script(script: Path, *arguments: object) -> None:
    """Run a script of this repository and wait for it to finish.

    Args:
        script: its file.
        arguments: its command line.

    Raises:
        SystemExit: it failed; the message contains the end of its output.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as log:
        process = FORKS.Process(target=_main, args=(str(script), words, log.name))
        process.start()
        process.join()
        if process.exitcode:
            output = log.read()[-4000:]
            raise SystemExit(
                f"{script.name} {' '.join(words)}\nfailed with exit code {process.exitcode}:\n{output}"
            )


def _end_with_parent() -> None:
    """End this process when the study ends, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _main(script: str, words: list[str], log: str) -> None:
    # The parent of a forked process is the fork server. Without this, a script whose study was killed would
    # go on writing to the folder while the study that resumes there starts it again.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
