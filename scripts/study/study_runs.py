"""Programs of scripts/study/study.py: each a process, forked from one that has imported everything.

Starting Python and importing take several seconds, a fine-tuning ten, and there are seventy.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of the programs."""
FORKS = multiprocessing.get_context("forkserver")
AHEAD = ["train_dft", "evaluate", "scripts.study.study_results", "scripts.study.study_task"]


def prepare() -> None:
    """To be called before the first program; sets the environment of this process, too."""
    mine = [str(ROOT), str(ROOT / "scripts")]  # for what is imported ahead
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *mine)]
    os.environ.update(SETTINGS, PYTHONPATH=os.pathsep.join(mine + given))
    FORKS.set_forkserver_preload(AHEAD)


def command(program: Path, *words: object) -> None:
    """Runs a program of this repository with these words, and waits for its end.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    said = [str(word) for word in words]
    with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as log:
        process = FORKS.Process(target=_main, args=(str(program), said, log.name))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(
                f"{program.name} {' '.join(said)}\nended with {process.exitcode}:\n{log.read()[-4000:]}"
            )


def _main(program: str, words: list[str], log: str) -> None:
    into = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(into, 1)
    os.dup2(into, 2)
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")
