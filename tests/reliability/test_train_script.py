"""scripts/train.sh with the real launcher: a run that loses a rank and is stopped still ends the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dft.errors import EXIT_STOPPED
from tests.launching import ROOT
from tests.reliability.test_resume import logged

FLAGS = {
    "num_train_epochs": 4, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 2,
    "save_only_model": False, "torch_dtype": "float32", "bf16": False, "dft_alpha": 1.0, "max_length": 512,
    "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "warmup_ratio": 0.05,
    "per_device_eval_batch_size": 8,
    "enable_gradient_checkpointing": False, "report_to": "none", "lr_scheduler_type": "cosine",
    "weight_decay": 0.01, "save_total_limit": 3, "preprocessing_num_workers": 2,
}  # fmt: skip
LIMIT = 120
"""Maximum seconds of each step of the test."""


def start(example, output: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "LOG_FILE": str(log),
        "MAX_RESTARTS": "2", "HOME": str(example.folder / "home"), "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(example.folder / "cache"),
    }  # fmt: skip
    words = example.words(output, **FLAGS)
    return subprocess.Popen([str(ROOT / "scripts/train.sh"), *words, *more], env=environment)


def rank(number: int) -> psutil.Process:
    """Return the process of a rank of the run that was started last."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RANK") == str(number) and "train_dft.py" in " ".join(process.cmdline()):
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return max(processes, key=psutil.Process.create_time)


def once(is_so) -> None:
    until = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_loses_a_rank_and_is_stopped_equals_an_undisturbed_run(example, forks, tmp_path):
    reference, output, log = example.folder / "undisturbed", example.folder / "disturbed", tmp_path / "log"
    zero = {"deepspeed": ROOT / "ds_config/zero3.json", "use_cpu": True}
    codes, printed = forks.run(example.words(reference, **FLAGS, **zero), 2)
    assert not any(codes), printed

    run = start(example, output, log)
    once((output / "checkpoint-2").is_dir)
    lost = rank(1)
    lost.kill()
    once(lambda: "restart 1 of 2, from checkpoint-" in log.read_text())
    assert f"error: rank 1 (process {lost.pid}" in log.read_text()
    after = int(log.read_text().split("from checkpoint-")[1].split()[0])
    once(lambda: any((output / f"checkpoint-{step}").is_dir() for step in range(after + 2, after + 5)))
    run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=LIMIT) == EXIT_STOPPED
    assert "stopped by SIGUSR1 after step" in log.read_text()

    again = start(example, output, tmp_path / "log2")
    assert again.wait(timeout=LIMIT) == 0, (tmp_path / "log2").read_text()
    expected, got = load_file(reference / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(weight, got[name]) for name, weight in expected.items())
    assert logged(output) == logged(reference)
