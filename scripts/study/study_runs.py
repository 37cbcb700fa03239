"""Run scripts in processes forked from one that has already imported the libraries.

The study fine-tunes about seventy models, each in ten seconds; importing the libraries would add several
seconds to each.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError
from scripts.study.study_task import file_name

SELECTION_SEED = -1
"""Seed of the runs that select learning rates."""
SETTINGS = {"TOKENIZERS_PARALLELISM": "false"}
"""Environment variables of the scripts."""
CPU_SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Further ones where they run on the CPU, several at a time."""
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["train_dft", "evaluate", "scripts.study.study_results", "scripts.study.study_task"]


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


def claim_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Record in the folder of a study what is studied, so that another study cannot reuse its results.

    Raises:
        UserError: the folder holds anything other than this study.
    """
    record, content = folder / "size.json", json.dumps(description)
    if folder.is_dir() and any(folder.iterdir()) and not (record.is_file() and record.read_text() == content):
        raise UserError(f"{folder}: holds something else than a study of this size; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(content)


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


def _main(script: str, words: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
