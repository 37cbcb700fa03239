"""Importing the package loads only the modules that are used."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

import dft
import dft.startup
from dft.errors import EXIT_INTERRUPTED
from dft.startup import fast_imports
from tests.launching import ROOT

HEAVY = (
    "transformers",
    "transformers.trainer",
    "matplotlib",
    "datasets",
    "accelerate",
    "deepspeed",
    "dft.training",
)
FOR_RUNS_ONLY = (
    "datasets",
    "deepspeed",
    "dft.data.batches",
    "dft.fine_tune",
    "dft.report",
    "dft.training.trainer",
    "matplotlib",
    "pandas",
    "pyarrow",
    "swanlab",
    "tensorboard",
    "torch.utils.tensorboard",
    "transformers.trainer",
    "trl",
    "wandb",
)
"""Modules that --help and wrong flags do without."""
ANSWER = f"""
import sys
import train_dft
sys.argv[0] = "train_dft.py"
try:
    train_dft.main()
finally:
    print("\\nloaded:", *[module for module in {FOR_RUNS_ONLY!r} if module in sys.modules])
"""


def test_importing_the_loss_does_not_load_the_trainer():
    names = "dft_loss, linear_dft_loss, make_objective, Objective, TokenStats"
    code = f"import sys; from dft import {names}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == []


def test_every_public_name_can_be_imported():
    assert {name: getattr(dft, name).__name__ for name in dft.__all__} == {name: name for name in dft.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dft' has no attribute 'dft_los'"):
        dft.dft_los  # noqa: B018


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["--help"], 0, "--model_name_or_path"),
        (
            ["--model_name_or_path", "m", "--data_files", "d", "--learning_rat", "1"],
            2,
            "error: unknown argument --learning_rat; did you mean --learning_rate?",
        ),
        (
            ["--model_name_or_path", "m", "--data_files", "d", "--learning_rate", "high"],
            2,
            "error: argument --learning_rate/--learning-rate: invalid float value: 'high'",
        ),
    ],
)
def test_help_and_wrong_flags_are_answered_without_loading_the_trainer(words, code, answer):
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code
    assert answer in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_an_interrupt_while_libraries_are_imported_is_reported_in_one_line():
    command = [sys.executable, "-X", "importtime", "train_dft.py", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        if not line.startswith("import time:"):
            lines.append(line)
        elif line.split()[-1] == "torch.torch_version":
            process.send_signal(signal.SIGINT)
    assert lines == ["interrupted\n"]
    assert process.wait(timeout=60) == EXIT_INTERRUPTED


def test_a_library_that_catches_an_interrupt_does_not_continue(tmp_path):
    """torch goes on without numpy if the import of numpy is interrupted, and numpy fails later."""
    (tmp_path / "catching.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    sum(range(10**6))\n"
        "except BaseException:\n    pass\n"
    )
    code = (
        "from dft.errors import report_user_errors\nfrom dft.startup import fast_imports\n"
        "report_user_errors()\nwith fast_imports():\n    import catching\nprint('continued')"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_INTERRUPTED, "", "interrupted\n")


def test_garbage_collection_is_paused_for_imports_and_skips_what_they_created():
    with pytest.raises(ImportError), fast_imports():
        assert not gc.isenabled()
        imported = [[]]
        raise ImportError
    try:
        assert gc.isenabled()
        assert not any(item is imported for item in gc.get_objects())
    finally:
        gc.unfreeze()


def test_imports_that_take_long_are_announced_once_by_the_first_rank(capfd, monkeypatch):
    monkeypatch.setattr(dft.startup, "PATIENCE", 0.0)
    dft.startup._announce.cache_clear()
    printed = ""
    with fast_imports():
        deadline = time.monotonic() + 30
        while not printed.endswith("\n") and time.monotonic() < deadline:
            printed += capfd.readouterr().err
    assert printed.startswith("start       importing torch and transformers")
    for rank in ("0", "1"):  # the second step of the imports of rank 0, and another rank
        monkeypatch.setenv("RANK", rank)
        with fast_imports():
            time.sleep(0.1)
        assert capfd.readouterr().err == ""
        dft.startup._announce.cache_clear()
    gc.unfreeze()
