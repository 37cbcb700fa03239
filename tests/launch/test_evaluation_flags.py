"""Command lines that stop early and evaluate on several data sets."""

import json

import pytest

from tests.launching import ROOT, eval_records

ZERO3 = {"deepspeed": ROOT / "ds_config/zero3.json"}


@pytest.mark.parametrize("kind", ["single", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_stops_early_and_says_why(example, forks, kind):
    """With learning rate 0 all evaluations are equal: the first is the best, the third the last."""
    output = example.folder / f"early-{kind}"
    words = example.words(
        output, learning_rate=0, max_steps=8, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=1, early_stopping_patience=2, load_best_model_at_end=True, report=True,
        max_eval_samples=4, **(ZERO3 if kind == "zero3" else {}),
    )  # fmt: skip
    codes, printed = forks.run(words, 2 if kind == "zero3" else 1)
    assert set(codes) == {0}, printed
    acc = eval_records(output)[0]["eval_acc"]
    reason = f"eval_acc did not improve in 2 evaluations in a row; best: {acc:.4g} at step 1"
    assert f"stopped     early at step 3: {reason}" in printed
    assert f"best        {output / 'checkpoint-1'} (eval_acc {acc:.4g})" in printed
    assert json.loads((output / "report.json").read_text())["status"] == f"finished early: {reason}"
    saved = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    attributes = saved["stateful_callbacks"]["EarlyStopping"]["attributes"]
    assert attributes["early_stopping_patience_counter"] == 2
    codes, printed = forks.run([*words, "--resume_from_checkpoint", "auto"], 2 if kind == "zero3" else 1)
    assert set(codes) == {0} and f"stopped     early at step 3: {reason}" in printed
