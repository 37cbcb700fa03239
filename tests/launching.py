"""Starts train_dft.py the way a user does, in processes of its own that never outlive the test."""

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
"""Seconds after which a run counts as hung. A run here takes 10 to 40."""


@dataclass(frozen=True)
class Finished:
    """A run that ended: its exit code and everything it printed, standard error included."""

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
    """Runs a script under `python`, `torchrun` or `deepspeed` on the CPU and waits for it.

    `folder` takes caches and whatever else the run leaves behind; runs that share it share their prepared
    data.
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
    home = folder / "home"  # without a login of a tracker, as its variables are left out
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SWANLAB_"))}
    environment = {
        **kept,
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
    """What a run logged, in order."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def train_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in history(folder) if "grad_norm" in record]


def eval_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in history(folder) if "eval_nll" in record]
