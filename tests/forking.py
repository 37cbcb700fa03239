"""Runs of train_dft.py whose processes are forked from one that has imported everything.

Starting Python and importing take six seconds, training takes one. The ranks are processes of their own all
the same, and are killed as such.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft.training.parallel import rank_watchdog
from tests.launching import ROOT, free_port

LIMIT = 120
"""Seconds after which a run counts as hung."""


@dataclass
class Run:
    """A run that was started.

    Attributes:
        processes: of its ranks, in order.
        log: what they print.
    """

    processes: list[int]
    log: Path
    _server: subprocess.Popen[str]

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Sends a signal to one rank, or to all of them; those that have ended do not mind."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def codes(self) -> list[int]:
        """Waits for the end of all ranks; a code below 0 is the signal that ended one."""
        return json.loads(self._server.stdout.readline())

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Forks:
    """The process that runs are forked from; one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        (folder / "home").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SWANLAB_"))}
        environment = {
            **kept,
            "HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def start(self, words: list[str], ranks: int = 1, **env: str) -> Run:
        """Starts a run; `env` are variables of its own, among them those of `tests.dying`."""
        self._count += 1
        log = self.folder / f"run-{self._count}.log"
        asked = {"words": words, "ranks": ranks, "env": env, "port": free_port(), "log": str(log)}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Run(json.loads(self._server.stdout.readline()), log, self._server)

    def run(self, words: list[str], ranks: int = 1, **env: str) -> tuple[list[int], str]:
        """The exit codes of the ranks, and what they printed."""
        started = self.start(words, ranks, **env)
        return started.codes(), started.output

    def close(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()


@contextmanager
def forking(folder: Path) -> Iterator[Forks]:
    forks = Forks(folder)
    try:
        yield forks
    finally:
        forks.close()


# ---- the process itself ----


def serve() -> None:
    import dft.report.pages.run  # noqa: F401 - what runs import late
    import train_dft
    from tests.dying import DyingTrainer

    train_dft.DFTTrainer = DyingTrainer
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        started = [fork_rank(asked, rank) for rank in range(asked["ranks"])]
        print(json.dumps(started), file=answers, flush=True)
        print(json.dumps(wait_for(started)), file=answers, flush=True)


def fork_rank(asked: dict[str, Any], rank: int) -> int:
    process = os.fork()
    if process:
        return process
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(asked["env"])
    if asked["ranks"] > 1 or "--deepspeed" in asked["words"]:  # which wants a launcher for one rank as well
        world = {"WORLD_SIZE": asked["ranks"], "LOCAL_WORLD_SIZE": asked["ranks"], "RANK": rank}
        world |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": asked["port"]}
        os.environ.update({name: str(value) for name, value in world.items()})
    if "MACHINES" in asked["env"]:  # pretend that each rank runs on the named machine
        machine, host = asked["env"]["MACHINES"].split()[rank], asked["env"]["HOST"]
        rank_watchdog.machine_id = lambda: machine
        socket.gethostname = lambda: host
    rank_watchdog.SILENCE = float(asked["env"].get("SILENCE", rank_watchdog.SILENCE))  # seconds
    sys.argv = ["train_dft.py", *asked["words"]]
    os._exit(main_of_rank())


def main_of_rank() -> int:
    """Runs train_dft.py as if it were the program, and gives its exit code."""
    import train_dft

    code: Any = 0
    try:
        train_dft.main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())
            code = 1
        except SystemExit as left:
            code = left.code
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def wait_for(started: list[int]) -> list[int]:
    """Exit codes. As a launcher does, ends the others a moment after a rank that fails."""
    codes: dict[int, int] = {}
    until, failed = time.monotonic() + LIMIT, None
    while len(codes) < len(started):
        for process in [one for one in started if one not in codes]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        if failed is None and any(codes.values()):
            failed = time.monotonic()
        patience = 1 if failed is not None and time.monotonic() < failed + 10 else None
        if failed is not None and time.monotonic() > failed + 1:
            for process in set(started) - codes.keys():
                os.kill(process, signal.SIGTERM if patience else signal.SIGKILL)
            time.sleep(0.5)
        if time.monotonic() > until:
            for process in set(started) - codes.keys():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[process] for process in started]


if __name__ == "__main__":
    serve()
