"""Start runs of train_dft.py as forks of a process that has imported everything.

Starting Python and importing take six seconds, training takes one. Each rank is still a separate process and
can be killed.
"""

import gc
import importlib
import json
import os
import runpy
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

import psutil

from dft.training.parallel import rank_watchdog, stopping
from tests.launching import ROOT, free_port

TIME_LIMIT = 240
"""Seconds after which a run counts as hung, unless the environment variable of this name sets others."""


@dataclass
class Run:
    """A started run.

    Attributes:
        processes: process ids of its ranks, in order.
        log: file with their output.
    """

    processes: list[int]
    log: Path
    _server: subprocess.Popen[str]

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all; exited ranks are skipped."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def codes(self) -> list[int]:
        """Wait for all ranks and return their exit codes; below 0, the signal that ended the rank."""
        return json.loads(self._server.stdout.readline())

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Forks:
    """Client of the process that runs are forked from; one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        (folder / "home").mkdir(exist_ok=True)
        trackers = ("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(trackers)},
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

    def start(
        self, words: list[str], ranks: int = 1, script: Path = ROOT / "train_dft.py", **env: str
    ) -> Run:
        """Start a run.

        Args:
            words: flags of train_dft.py.
            ranks: number of ranks.
            script: program to run as the main program.
            **env: environment variables of the run, including those of `tests.dying` and `fork_rank`.
        """
        self._count += 1
        log = self.folder / f"run-{self._count}.log"
        request = {
            "words": words, "ranks": ranks, "script": str(script), "env": env, "port": free_port(),
            "log": str(log),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Run(json.loads(self._server.stdout.readline()), log, self._server)

    def run(
        self, words: list[str], ranks: int = 1, script: Path = ROOT / "train_dft.py", **env: str
    ) -> tuple[list[int], str]:
        """Run to completion; return the exit codes of the ranks and their output."""
        run = self.start(words, ranks, script, **env)
        return run.codes(), run.output

    def processes(self) -> list[int]:
        """Return the ids of all processes that ranks have forked and that are still running."""
        processes = []
        for process in psutil.pids():
            with suppress(ProcessLookupError):
                if os.getsid(process) == self._server.pid != process:
                    processes.append(process)
        return processes

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


# The code below runs in the server process and in the ranks that it forks.


PRELOADED = (
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.stage3",
    "dft.fine_tune", "dft.report.pages.run", "torch._inductor.compile_fx", "torch.utils.serialization",
    "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip


def preload() -> None:
    """Import all that runs with and without DeepSpeed need, so that forks of this process share it.

    DeepSpeed and what its decorators import take 60 % of the CPU time of a short run under ZeRO-3.
    """
    for name in PRELOADED:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen3")  # compiles 900 patterns, once
    gc.collect()
    gc.freeze()  # forks neither traverse nor copy what exists here


def serve() -> None:
    """Fork runs as requested on stdin, and answer with process ids and exit codes on stdout."""
    preload()
    import dft.training.run
    from tests.dying import DyingTrainer

    dft.training.run.DFTTrainer = DyingTrainer
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        processes = [fork_rank(request, rank) for rank in range(request["ranks"])]
        print(json.dumps(processes), file=answers, flush=True)
        limit = float(request["env"].get("TIME_LIMIT", TIME_LIMIT))
        print(json.dumps(wait_for(processes, limit)), file=answers, flush=True)


def fork_rank(request: dict[str, Any], rank: int) -> int:
    """Fork one rank and return its process id."""
    process = os.fork()
    if process:
        return process
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    if request["ranks"] > 1 or "--deepspeed" in request["words"]:  # DeepSpeed needs them even for one rank
        world = {"WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"], "RANK": rank}
        world |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in world.items()})
    if "FOLDERS" in request["env"]:  # each rank is the only one of a node, and works in its folder
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.chdir(request["env"]["FOLDERS"].split(os.pathsep)[rank])
    if "MACHINES" in request["env"]:  # pretend that each rank runs on the named machine
        machine, host = request["env"]["MACHINES"].split()[rank], request["env"]["HOST"]
        rank_watchdog.machine_id = lambda: machine
        socket.gethostname = lambda: host
    if "SILENCE" in request["env"]:  # seconds
        rank_watchdog.HEARTBEAT_TIMEOUT = float(request["env"]["SILENCE"])
    if "LATE_STOP" in request["env"]:  # agree on a stop one step late, as on a GPU
        stopping.DEVICE_TYPES = frozenset({"cpu"})
    sys.argv = ["train_dft.py", *request["words"]]
    os._exit(main_of_rank(request["script"]))


def main_of_rank(script: str) -> int:
    """Run a script as the main program and return its exit code."""
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_error:
        code = exit_error.code
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())
            code = 1
        except SystemExit as exit_error:
            code = exit_error.code
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def wait_for(processes: list[int], limit: float) -> list[int]:
    """Return the exit codes of ranks. Like a launcher, end the other ranks shortly after one fails."""
    codes: dict[int, int] = {}
    deadline, failed_at = time.monotonic() + limit, None
    while len(codes) < len(processes):
        for process in [process for process in processes if process not in codes]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        is_patient = failed_at is not None and time.monotonic() < failed_at + 10
        if failed_at is not None and time.monotonic() > failed_at + 1:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGTERM if is_patient else signal.SIGKILL)
            time.sleep(0.5)
        if time.monotonic() > deadline:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[process] for process in processes]


if __name__ == "__main__":
    serve()
