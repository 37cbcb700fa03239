"""User errors end every rank with code 2 and are printed once; other errors keep their traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT

SCRIPT = """
import dft.errors
from dft.errors import UserError, report_user_errors
dft.errors.RANK_ZERO_DELAY = 1.5
report_user_errors()
print("raising", flush=True)
raise {error}
"""


def start(error: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(error=error)],
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


def test_other_ranks_print_the_error_if_rank_0_has_none():
    process = start('UserError("--flag 3: no")', LOCAL_RANK="1", RANK="5")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.endswith("[rank 5] error: --flag 3: no\n")


def test_rank_that_is_ended_while_it_waits_prints_nothing():
    process = start('UserError("--flag 3: no")', LOCAL_RANK="1")
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
