"""The summary shows the first and the last values of the logged metrics."""

import json

import pytest

from dft.errors import UserError
from scripts.summarize_run import first_and_last, held_out_question, table

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


def test_the_table_has_columns_for_each_evaluation_set():
    log = [{"step": 1, "eval_a_long_name_nll": 3.0}, {"step": 1, "eval_b_nll": 2.0}]
    head, *rows = table(log).splitlines()
    assert "eval_a_long_name first" in head and "eval_b first" in head
    (row,) = (row for row in rows if row.startswith("nll"))
    assert row.split()[1:] == ["-", "-", "3.0000", "3.0000", "2.0000", "2.0000"]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_question_is_that_of_the_line(tmp_path):
    file = tmp_path / "eval.jsonl"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    file.write_text(json.dumps({"messages": []}) + "\n" + json.dumps({"messages": turns}) + "\n")
    assert held_out_question(file, 2) == (turns[:1], "4")


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        ("{}", 0, "--line 0: must be at least 1"),
        ("{}", 2, "--line 2: .*eval.jsonl has fewer lines"),
        ("{}", 1, "eval.jsonl:1: is not a row with messages that have an answer"),
        ('{"messages": [{"role": "user", "content": "2 + 2?"}]}', 1, "eval.jsonl:1: is not a row"),
        ('{"messages": [', 1, "eval.jsonl:1: is not a row"),
        ("[]", 1, "eval.jsonl:1: is not a row"),
        (None, 1, "--question .*eval.jsonl: cannot be read"),
    ],
)
def test_unusable_question_is_one_error(tmp_path, row, line, message):
    if row is not None:
        (tmp_path / "eval.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=message):
        held_out_question(tmp_path / "eval.jsonl", line)
