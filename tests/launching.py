"""Start train_dft.py as a user does, in processes that never outlive the test."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT = 240
"""Seconds after which a run is considered hung. Runs take 10 to 40 seconds."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its exit code and its output, including standard error."""

    code: int
    output: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    words: list[str],
    *,
    folder: Path,
    launcher: str = "python",
    ranks: int = 2,
    script: Path = ROOT / "train_dft.py",
    env: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Finished:
    """Run a script under `python`, `torchrun` or `deepspeed` on the CPU and wait for it.

    `folder` receives caches and other leftovers of the run; runs with the same folder share prepared data.
    """
    commands = {
        "python": [sys.executable],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
            "--master_addr=127.0.0.1", f"--master_port={free_port()}",
        ],
        "deepspeed": [
            sys.executable, "-m", "deepspeed.launcher.runner", f"--num_accelerators={ranks}",
            f"--master_port={free_port()}",
        ],
    }  # fmt: skip
    home = folder / "home"  # without the login of a tracker
    home.mkdir(exist_ok=True)
    trackers = ("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(trackers)}
    environment = {
        **environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        **(env or {}),
    }
    process = subprocess.Popen(
        [*commands[launcher], str(script), *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"hung for {timeout} s; it had printed:\n{output}") from None
    return Finished(process.returncode, output)


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the log history of a run."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def train_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in history(folder) if "grad_norm" in record]


def eval_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in history(folder) if "eval_nll" in record]
