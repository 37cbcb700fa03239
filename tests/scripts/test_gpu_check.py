"""scripts/gpu_check.sh skips what it has no time or no means for, and refuses what it does not know."""

import os
import subprocess

import pytest

from tests.launching import ROOT


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "scripts/gpu_check.sh", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_checks_that_have_no_time_left_are_skipped_with_one_line(tmp_path):
    done = run(tmp_path / "out", "--cpu", "--minutes", 0)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert "skipped  attention: the 0 minutes are over" in lines
    assert "skipped  head-exact: tests/loss/test_cuda.py needs a GPU" in lines
    assert "skipped  gsm8k: no --model" in lines
    assert lines[-1] == f"results in {tmp_path / 'out'}"
    assert all(line.startswith("skipped") for line in lines[:-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the folder of the results"),
        (("OUT", "--minutes", "soon"), "--minutes soon: must be a number"),
        (("OUT", "--fast"), "unknown argument --fast"),
        (("OUT", "--model"), "a value is missing"),
    ],
)
def test_wrong_arguments_are_one_error(words, message):
    done = run(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert not (ROOT / "OUT").exists()
