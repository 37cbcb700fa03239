"""User errors end every rank with code 2 and are printed once; other errors keep their traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dft.errors import OutputClosed
from tests.launching import ROOT

SCRIPT = """
import dft.errors
from dft.errors import UserError, report_user_errors
dft.errors.RANK_ZERO_DELAY = {delay}
report_user_errors()
print("raising", flush=True)
raise {error}
"""


def start(error: str, delay: float = 1.5, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(error=error, delay=delay)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_user_error_prints_its_message_only():
    process = start('UserError("--flag 3: no")', LOCAL_RANK="0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.endswith("error: --flag 3: no\n") and "Traceback" not in errors


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\u4f60 \\xe9"), ("latin-1", "\\u4f60 é"), ("utf-8", "你 é")]
)
def test_characters_that_the_terminal_lacks_are_printed_as_escapes(encoding, shown):
    script = "from dft.errors import report_user_errors; report_user_errors(); print('你 é', flush=True)"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    printed = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=60)
    assert (printed.returncode, printed.stdout.decode(encoding)) == (0, f"{shown}\n")


PRINTING = """
import sys
from dft.errors import report_user_errors
report_user_errors()
sys.stdin.readline()  # until the reader has ended
print("x" * {length}, flush={flush})
"""


@pytest.mark.parametrize(
    ("length", "flush", "code"), [(100_000, False, 141), (10, True, 141), (10, False, 0)]
)
def test_output_that_nothing_reads_ends_the_program_quietly(length, flush, code):
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING.format(length=length, flush=flush)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (code, b"")


def test_another_broken_pipe_keeps_its_traceback():
    process = start('BrokenPipeError("of a socket")', LOCAL_RANK="0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" in errors
    assert errors.endswith("BrokenPipeError: of a socket\n")


def test_other_ranks_print_the_error_if_rank_0_has_none():
    process = start('UserError("--flag 3: no")', LOCAL_RANK="1", RANK="5")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.endswith("[rank 5] error: --flag 3: no\n")


def test_rank_that_is_ended_while_it_waits_prints_nothing():
    process = start('UserError("--flag 3: no")', delay=600, LOCAL_RANK="1")
    assert "raising\n" in iter(process.stdout.readline, "")
    time.sleep(0.3)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and "error:" not in errors


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_errors_keep_their_traceback_on_every_rank(rank):
    process = start('KeyError("internal")', LOCAL_RANK=rank, RANK=rank, WORLD_SIZE="2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = errors.splitlines()
    assert f"[rank {rank}] Traceback (most recent call last):" in lines
    assert lines[-1] == f"[rank {rank}] KeyError: 'internal'"


@pytest.mark.parametrize(("is_closed", "kind"), [(True, OutputClosed), (False, BrokenPipeError)])
def test_a_run_whose_output_is_closed_says_how_to_continue(monkeypatch, is_closed, kind):
    from dft import fine_tune

    def print_a_line(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(fine_tune, "train_and_save", print_a_line)
    monkeypatch.setattr(fine_tune, "output_is_closed", lambda: is_closed)
    with pytest.raises(kind) as error:
        fine_tune.train(None, None, None)
    if is_closed:
        assert error.value.code == 141 and "--resume_from_checkpoint auto" in str(error.value)
