"""Lines that are printed before the first step."""

import pytest
import transformers

from dft.report.terminal.start_and_end import _interval_lines, _schedule_lines, _trained


@pytest.mark.parametrize(
    ("warmup", "steps", "shown", "has_note"),
    [(0, 3, 0, False), (2, 3, 2, False), (3, 3, 3, True), (10, 3, 3, True), (0.1, 20, 2, False)],
)
def test_a_warm_up_as_long_as_the_run_is_reported(tmp_path, warmup, steps, shown, has_note):
    training = transformers.TrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=warmup)
    line, *notes = _schedule_lines(training, steps)
    assert line == (f"schedule    {steps} optimizer steps ({shown} for warm-up), linear, learning rate 5e-05")
    expected = (
        f"--warmup_steps {warmup}: the run has only {steps} steps, so its learning rate never reaches 5e-05"
    )
    assert notes == ([f"note        {expected}"] if has_note else [])


def test_intervals_that_are_a_share_of_the_run_are_shown_in_steps(tmp_path):
    shares = {"logging_steps": 0.01, "eval_steps": 0.5, "eval_strategy": "steps", "save_steps": 0.1}
    training = transformers.TrainingArguments(str(tmp_path), use_cpu=True, **shares)
    (line,) = _interval_lines(training, 70)
    assert line == (
        "intervals   --logging_steps 0.01 is every step, --eval_steps 0.5 is every 35 steps, "
        "--save_steps 0.1 is every 7 steps"
    )
    assert _interval_lines(transformers.TrainingArguments(str(tmp_path), use_cpu=True), 70) == []


def test_what_a_filter_leaves_out_is_not_counted():
    train = {"rows": 10, "supervised_tokens": 100, "tokens": 300}
    assert _trained({"train": train}) == train
    counts = {"rows": 9, "dropped_tokens": 30}
    assert _trained({"train": train, "base_filter": counts}) == {
        "rows": 9, "supervised_tokens": 70, "tokens": 300,
    }  # fmt: skip
