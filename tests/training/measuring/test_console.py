"""The lines of the log, and the rank in front of warnings where there are several."""

import os
import subprocess
import sys

from dft.console import clock
from dft.training.measuring.console import log_line
from tests.launching import ROOT

TRAIN = {
    "loss": 0.123456, "nll": 2.5, "avg_p_correct": 0.5, "acc": 0.75, "objective": 1.25, "entropy": 1.5,
    "effective_tokens": 0.5, "p_end_of_turn": 0.01, "grad_norm": 1.0, "learning_rate": 2e-6, "dft_alpha": 1.0,
    "tokens_per_second": 12345.6, "supervised_tokens": 999, "padding_share": 0.25, "peak_memory_gib": 12.3456,
    "seconds_left": 3725.4, "epoch": 0.5,
}  # fmt: skip


def test_a_line_of_training_has_everything_that_changes():
    line = log_line(TRAIN, 7, 1000)
    assert line.startswith(
        "train step    7/1000  epoch 0.50    loss 0.1235     nll 2.5        avg_p_correct 0.5"
    )
    for part in ("entropy 1.5", "p_end_of_turn 0.01", "learning_rate 2e-06", "tokens_per_second 12346"):
        assert part in line
    assert line.endswith("memory 12.35 GiB  left 1:02:05") and "\n" not in line


def test_lines_stand_under_one_another():
    other = log_line({**TRAIN, "loss": 10.5, "nll": 0.00012345}, 998, 1000)
    assert other.index("nll ") == log_line(TRAIN, 7, 1000).index("nll ")
    assert other.index("grad_norm") == log_line(TRAIN, 7, 1000).index("grad_norm")


def test_a_window_without_a_metric_leaves_its_place():
    logs = {name: value for name, value in TRAIN.items() if name not in ("p_end_of_turn", "loss")}
    line = log_line(logs, 7, 1000)
    assert "loss -  " in line and "p_end_of_turn -  " in line
    assert line.index("grad_norm") == log_line(TRAIN, 7, 1000).index("grad_norm")


def test_a_line_of_evaluation_has_its_metrics_and_no_histogram():
    logs = {f"eval_{name}": value for name, value in TRAIN.items()} | {"epoch": 1.0, "eval_runtime": 3.0}
    line = log_line(logs, 10, 1000)
    assert line.startswith("eval  step   10/1000  epoch 1.00    loss 0.1235")
    assert line.endswith("supervised_tokens 999") and "eval_" not in line


def test_what_is_no_record_of_metrics_has_no_line():
    assert log_line({"train_runtime": 3.0, "epoch": 1.0}, 10, 10) is None


def test_hours_minutes_and_seconds():
    assert [clock(one) for one in (0, 59.6, 3600, 90061)] == ["0:00:00", "0:01:00", "1:00:00", "25:01:01"]


SCRIPT = """
import logging, warnings
from transformers.utils import logging as theirs
from dft.training.measuring.console import tag_warnings
tag_warnings()
warnings.warn("one")
theirs.get_logger("transformers.x").warning("two")
logging.getLogger("accelerate.y").warning("three")
"""


def lines_of(**env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": str(ROOT), **env}, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    return [line for line in done.stderr.splitlines() if any(w in line for w in ("one", "two", "three"))]


def test_warnings_name_their_rank_where_there_are_several():
    found = lines_of(WORLD_SIZE="2", RANK="1")
    assert len(found) >= 3 and all(line.startswith("[rank 1] ") for line in found if "warn(" not in line)
