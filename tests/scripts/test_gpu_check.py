"""scripts/gpu_check.sh skips what it has no time or no means for, and refuses what it does not know."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

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


@pytest.fixture
def fake_checks(tmp_path):
    """A copy of the script whose Python only does what the file of the check's name says."""
    scripts = tmp_path / "project/scripts"
    scripts.mkdir(parents=True)
    for name in ("gpu_check.sh", "environment.sh"):
        shutil.copy(ROOT / "scripts" / name, scripts)
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/bash\n[[ $1 != -c ]] || exit 0\n"
        f'name=$(basename "$1" .py)\n[[ $name != check_gpu ]] || name=$2\n'
        f'echo "$name"; [[ ! -f "{tmp_path}/$name" ]] || . "{tmp_path}/$name"\n'
    )
    python.chmod(0o755)
    return scripts / "gpu_check.sh"


def start(script, folder, *words, **options):
    """Start a copy of the script in a folder."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": str(script.parents[2] / "venv")}
    return subprocess.Popen(
        ["bash", script, *words], cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def test_a_check_that_fails_or_is_killed_fails_and_the_others_run(fake_checks, tmp_path):
    """An exit code of 137 is that of a check killed for memory as well as of one ended for time."""
    (tmp_path / "attention").write_text("kill -KILL $$")
    (tmp_path / "precision").write_text("exit 3")
    (tmp_path / "bench_head").write_text("exit 124")
    (tmp_path / "here").mkdir()
    process = start(fake_checks, tmp_path / "here", "my results", "--cpu", "--minutes", "08")
    process.communicate(timeout=60)
    lines = (tmp_path / "here/my results/summary.txt").read_text().splitlines()
    states = [re.sub(r" \(\d+ s\)", "", line) for line in lines if line.startswith(("passed", "FAILED"))]
    assert states == [
        "passed   environment", "FAILED   attention, exit code 137", "FAILED   precision, exit code 3",
        "FAILED   bench-head, exit code 124", "FAILED   profile-head, exit code 124",
    ]  # fmt: skip
    assert process.returncode == 1
    assert (tmp_path / "here/my results/attention.log").read_text().startswith("attention")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_the_check_and_the_script(fake_checks, tmp_path, number, name):
    pid = tmp_path / "pid"
    (tmp_path / "attention").write_text(f"echo $$ >{pid}.new; mv {pid}.new {pid}; sleep 60 & wait")
    process = start(fake_checks, tmp_path, "out", "--cpu", start_new_session=True)
    try:
        wait_until(pid.is_file)
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == 128 + number
        wait_until(lambda: not Path("/proc", pid.read_text().strip()).exists())
    finally:
        process.kill()
    last = (tmp_path / "out/summary.txt").read_text().splitlines()[-1]
    assert last == f"stopped  by {name}; results in {tmp_path / 'out'}"


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_weights_in_pieces_are_joined(fake_checks, tmp_path):
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for index, text in enumerate(("ab", "cd")):
        (model / f"model.safetensors.part-a{index}").write_text(text)
    start(fake_checks, tmp_path, "out", "--cpu", "--model", "my model").communicate(timeout=60)
    assert (tmp_path / "out/model/model.safetensors").read_text() == "abcd"
    assert sorted(path.name for path in (tmp_path / "out/model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert "passed   study" in (tmp_path / "out/summary.txt").read_text()


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
        (("OUT", "--minutes", "soon"), "--minutes soon: must be a whole number from 0 to 1440"),
        (("OUT", "--minutes", "-5"), "--minutes -5: must be a whole number"),
        (("OUT", "--minutes", "1441"), "--minutes 1441: must be a whole number"),
        (("OUT", "--minutes"), "--minutes: a value is missing"),
        (("OUT", "--gsm8k"), "--gsm8k: a value is missing"),
        (("OUT", "--gsm8k", "A", "--cpu"), "--gsm8k: a value is missing"),
        (("OUT", "--gsm8k", "A", "B"), "--gsm8k: A is not a file"),
        (("OUT", "--model", "nowhere"), "--model: nowhere/config.json does not exist"),
        (("OUT", "--fast"), "unknown argument --fast"),
        (("OUT", "--model"), "--model: a value is missing"),
    ],
)
def test_wrong_arguments_are_one_error(words, message):
    done = run(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert not (ROOT / "OUT").exists()


def test_a_folder_that_cannot_be_made_is_an_error():
    done = run("/proc/out", "--cpu", "--minutes", 0)
    assert done.returncode == 2 and "error: /proc/out: cannot be made; name another folder" in done.stderr
