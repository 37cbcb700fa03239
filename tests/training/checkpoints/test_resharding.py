"""Conversion of DeepSpeed checkpoints for another number of ranks, with a stand-in for the converter."""

import pytest
from accelerate import Accelerator

from dft.errors import UserError
from dft.training.checkpoints import resharding
from dft.training.parallel import waiting


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "checkpoint-4" / "global_step4"
    folder.mkdir(parents=True)
    (folder.parent / "scheduler.pt").write_bytes(b"schedule")
    return folder


def convert(state, monkeypatch, program: str, converts: bool = True) -> int:
    """Run the conversion with a Python program as the converter. Return the number of progress reports."""
    beats = []
    monkeypatch.setattr(resharding, "CONVERTER", ("-c", program))
    monkeypatch.setattr(waiting, "PERIOD", 0.05)
    monkeypatch.setattr(waiting.wait_until, "__defaults__", (0.05,))
    target = state.parent.parent / "universal"
    resharding.convert(state, target, converts, Accelerator(cpu=True), lambda: beats.append(1))
    return len(beats)


def test_progress_is_reported_while_the_converter_runs(state, monkeypatch):
    """Without progress reports, the watchdog would end a run whose conversion exceeds --ddp_timeout."""
    program = "import os, sys, time; time.sleep(1); os.makedirs(sys.argv[-1])"
    assert convert(state, monkeypatch, program) > 5
    universal = state.parent.parent / "universal"
    assert (universal / "global_step4").is_dir()
    assert (universal / "scheduler.pt").read_bytes() == b"schedule"


def test_a_failed_conversion_is_one_error_and_leaves_nothing(state, monkeypatch):
    program = "import os, sys; os.makedirs(sys.argv[-1]); sys.exit('no space left')"
    with pytest.raises(UserError, match="cannot be converted for another number of ranks: no space left"):
        convert(state, monkeypatch, program)
    assert not (state.parent.parent / "universal").exists()


def test_a_rank_that_does_not_convert_waits_for_the_others(state, monkeypatch):
    assert convert(state, monkeypatch, "raise SystemExit(1)", converts=False) == 1
