"""The summary shows the first and the last values of the logged metrics."""

from scripts.summarize_run import first_and_last, table

HISTORY = [
    {"step": 0, "eval_nll": 4.0, "eval_acc": 0.0},
    {"step": 1, "nll": 3.0, "loss": 0.5},
    {"step": 2, "nll": 2.0, "loss": 0.75},
    {"step": 2, "eval_nll": 1.5, "eval_acc": 0.25},
    {"step": 2, "train_runtime": 3.0},
]


def test_first_and_last_skip_records_without_the_metric():
    assert first_and_last(HISTORY, "nll") == (3.0, 2.0)
    assert first_and_last(HISTORY, "eval_nll") == (4.0, 1.5)
    assert first_and_last(HISTORY, "acc") is None


def test_the_table_shows_training_and_evaluation_side_by_side():
    rows = {line.split()[0]: line.split()[1:] for line in table(HISTORY).splitlines()[1:]}
    assert rows["loss"] == ["0.5000", "0.7500", "-", "-"]
    assert rows["nll"] == ["3.0000", "2.0000", "4.0000", "1.5000"]
    assert rows["acc"] == ["-", "-", "0.0000", "0.2500"]
