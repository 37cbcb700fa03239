"""Run scripts in processes forked from one that has already imported the libraries.

The study fine-tunes about seventy models, each in ten seconds; importing the libraries would add several
seconds to each.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = {"TOKENIZERS_PARALLELISM": "false"}
"""Environment variables of the scripts."""
CPU_SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Further ones where they run on the CPU, several at a time."""
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["train_dft", "evaluate", "scripts.study.study_results", "scripts.study.study_task"]


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
