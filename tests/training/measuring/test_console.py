"""Rows of the console output, and the rank in front of warnings if there are several ranks."""

import math
import os
import subprocess
import sys

import pytest
from transformers import TrainerControl, TrainerState

from dft.arguments.watch import WatchArguments
from dft.console import clock, short_clock, short_number
from dft.errors import UserError
from dft.metrics import CONSOLE, SCALARS, metrics_named
from dft.training.measuring.console import HEADING_EVERY, ConsoleCallback, heading, log_row
from tests.launching import ROOT

COLUMNS = metrics_named(CONSOLE)
TRAIN = {
    "loss": 0.123456, "nll": 2.5, "avg_p_correct": 0.5, "acc": 0.75, "objective": 1.25, "entropy": 1.5,
    "effective_tokens": 0.5, "p_end_of_turn": 0.01, "grad_norm": 1.0, "learning_rate": 2e-6, "dft_alpha": 1.0,
    "tokens_per_second": 12345.6, "supervised_tokens": 999, "padding_share": 0.25, "peak_memory_gib": 12.3456,
    "seconds_left": 3725.4, "epoch": 0.5,
}  # fmt: skip
LARGE = {
    **TRAIN, "loss": 12.3456, "nll": 12.3456, "grad_norm": 123456.7, "learning_rate": 1.8712e-5,
    "tokens_per_second": 1.2e6, "seconds_left": 99 * 3600 + 59 * 60 + 59, "epoch": 123.456,
}  # fmt: skip
NAN = dict.fromkeys(TRAIN, math.nan)
MISSING = {"learning_rate": 2e-6}
EVAL = {f"eval_{name}": value for name, value in TRAIN.items()} | {"epoch": 1.0, "eval_runtime": 3.0}


def evaluation(name: str) -> dict[str, float]:
    return {f"eval_{name}_{metric}": value for metric, value in LARGE.items()}


def test_a_training_row_has_the_default_columns():
    assert heading(COLUMNS, 1000).split() == [
        "epoch", "loss", "nll", "p", "acc", "grad_norm", "lr", "tok/s", "left",
    ]  # fmt: skip
    assert log_row(TRAIN, COLUMNS, 7, 1000) == (
        "train step    7/1000  0.500  0.1235  2.5000  0.5000  0.7500     1.0000  2.00e-6  12.3k   1:02:05"
    )


def test_an_evaluation_row_has_the_columns_that_evaluations_measure():
    assert log_row(EVAL, COLUMNS, 10, 1000) == ("eval  step   10/1000  1.000  0.1235  2.5000  0.5000  0.7500")


@pytest.mark.parametrize(
    "logs",
    [TRAIN, LARGE, NAN, MISSING, {**LARGE, "seconds_left": 99_999 * 3600.0}, EVAL, evaluation("math"),
     evaluation("a_very_long_name_of_a_dataset_" * 5)],
    ids=["usual", "large", "nan", "missing", "weeks left", "eval", "eval of a dataset", "eval, long name"],
)  # fmt: skip
@pytest.mark.parametrize("steps", [3, 100_000])
def test_rows_fit_100_columns_and_align_with_the_heading(logs, steps):
    row, head = log_row(logs, COLUMNS, steps, steps), heading(COLUMNS, steps)
    assert len(row) <= 100 and len(head) <= 100 and "\n" not in row
    assert row.startswith(("train step ", "eval  step "))
    measured = head.split()[: 9 if "learning_rate" in logs else 5]
    start = 0
    for name in measured:
        end = head.index(name, start) + len(name)
        assert row[end - 1] != " " and not row[end : end + 2].strip()
        start = end


def test_missing_metrics_and_nan_keep_their_columns():
    assert log_row(MISSING, COLUMNS, 7, 1000).split()[4:] == ["-", "-", "-", "-", "-", "2.00e-6", "-", "-"]
    assert log_row(NAN, COLUMNS, 7, 1000).split()[3:] == ["nan"] * 9


def test_the_dataset_of_an_evaluation_is_named_at_the_end_of_its_row():
    assert log_row(evaluation("math"), COLUMNS, 7, 1000).endswith("0.5000  0.7500  math")
    cut = log_row(evaluation("x" * 200 + "_end"), COLUMNS, 100_000, 100_000)
    assert len(cut) == 100 and "  ...xxx" in cut and cut.endswith("x_end")


def test_chosen_metrics_replace_the_default_columns():
    columns = metrics_named(["p_end_of_turn", "peak_memory_gib", "supervised_tokens"])
    assert heading(columns, 1000).split() == ["epoch", "p_end", "mem_GiB", "tokens"]
    assert log_row(TRAIN, columns, 7, 1000).split()[2:] == ["7/1000", "0.500", "0.0100", "12.346", "999"]
    assert log_row(EVAL, columns, 7, 1000).split()[3:] == ["1.000", "0.0100", "999"]
    every = log_row(LARGE, SCALARS, 7, 1000)
    assert len(every) == len(heading(SCALARS, 1000))


def test_the_flag_rejects_unknown_metrics():
    assert WatchArguments().console_metrics == list(CONSOLE)
    assert WatchArguments(console_metrics=["kl"]).console_metrics == ["kl"]
    with pytest.raises(UserError, match="--console_metrics nll los: unknown metric los; choose from loss"):
        WatchArguments(console_metrics=["nll", "los"])


def test_records_without_metrics_have_no_row():
    assert log_row({"train_runtime": 3.0, "epoch": 1.0}, COLUMNS, 10, 10) is None


def test_the_heading_is_printed_first_and_repeated(capsys):
    callback = ConsoleCallback(show_bar=False, metrics=["loss"])
    for main in (True, False):
        state = TrainerState(global_step=1, max_steps=50, is_world_process_zero=main)
        for _ in range(HEADING_EVERY + 1):
            callback.on_log(None, state, TrainerControl(), logs=TRAIN)
    lines = capsys.readouterr().out.splitlines()
    headings = [index for index, line in enumerate(lines) if line == heading(callback.columns, 50)]
    assert headings == [0, HEADING_EVERY + 1] and len(lines) == HEADING_EVERY + 3


def test_a_step_without_any_gradient_is_warned_of_once(capsys):
    callback = ConsoleCallback(show_bar=False)
    state = TrainerState(global_step=1, max_steps=50, is_world_process_zero=True)
    for norm in (1.0, 0.0, 0.0):
        callback.on_log(None, state, TrainerControl(), logs={**TRAIN, "grad_norm": norm})
    callback.on_log(None, state, TrainerControl(), logs=EVAL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "epoch", "train", "train", "warning", "changes", "train", "eval",
    ]  # fmt: skip
    assert lines[3].startswith("warning     the gradient is 0: the objective gives no target of this step a")


def test_hours_minutes_and_seconds():
    assert [clock(value) for value in (0, 59.6, 3600, 90061)] == ["0:00:00", "0:01:00", "1:00:00", "25:01:01"]


def test_durations_are_shortened_to_their_column():
    hours = [99 * 3600 + 3599, 123 * 3600 + 45 * 60, 1234 * 3600]
    assert [short_clock(value, 8) for value in hours] == ["99:59:59", "123h 45m", "1234h"]
    assert short_clock(math.nan, 8) == "nan"


@pytest.mark.parametrize(
    "value, text, narrow",
    [
        (0.0, "0.0000", "0.000"), (0.123456, "0.1235", "0.123"), (-0.123456, "-0.123", "-0.12"),
        (12.3456, "12.346", "12.35"), (999, "999", "999"), (123_456, "123456", "123k"),
        (9999.99, "10000", "10000"), (12345.6, "12.35k", "12.3k"), (999_999.0, "1.00M", "1.00M"),
        (1.2e6, "1.20M", "1.20M"), (5e15, "5000T", "5000T"),
        (2e-6, "2.0e-6", "2e-6"), (1.8712e-12, "2e-12", "2e-12"), (math.nan, "nan", "nan"),
        (-math.inf, "-inf", "-inf"),
    ],
)  # fmt: skip
def test_numbers_are_shortened_to_their_column(value, text, narrow):
    assert short_number(value, 6) == text and short_number(value, 5) == narrow


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


def test_warnings_name_their_rank_if_there_are_several():
    lines = lines_of(WORLD_SIZE="2", RANK="1")
    assert len(lines) >= 3 and all(line.startswith("[rank 1] ") for line in lines if "warn(" not in line)
    assert not any("rank" in line for line in lines_of(WORLD_SIZE="1"))
