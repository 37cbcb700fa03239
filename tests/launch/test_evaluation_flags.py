"""Command lines that stop early and evaluate on several data sets."""

import json

import pytest

from tests.launching import ROOT, eval_records, history

ZERO3 = {"deepspeed": ROOT / "ds_config/zero3.json"}


@pytest.mark.parametrize("kind", ["single", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_stops_early_and_says_why(example, forks, kind):
    """With learning rate 0 all evaluations are equal: the first is the best, the third the last."""
    output = example.folder / f"early-{kind}"
    words = example.words(
        output, learning_rate=0, max_steps=8, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=1, early_stopping_patience=2, load_best_model_at_end=True, report=True,
        max_eval_samples=4, **(ZERO3 if kind == "zero3" else {"optim": "muon"}),
    )  # fmt: skip
    codes, printed = forks.run(words, 2 if kind == "zero3" else 1)
    assert set(codes) == {0}, printed
    acc = eval_records(output)[0]["eval_acc"]
    reason = f"eval_acc did not improve in 2 evaluations in a row; best: {acc:.4g} at step 1"
    assert f"stopped     early at step 3: {reason}" in printed
    assert f"best        {output / 'checkpoint-1'} (eval_acc {acc:.4g})" in printed
    report = json.loads((output / "report.json").read_text())
    assert report["status"] == f"finished early: {reason}"
    assert (report["arguments"]["optim"] == "muon") == (kind == "single")
    saved = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    attributes = saved["stateful_callbacks"]["EarlyStopping"]["attributes"]
    assert attributes["early_stopping_patience_counter"] == 2
    codes, printed = forks.run([*words, "--resume_from_checkpoint", "auto"], 2 if kind == "zero3" else 1)
    assert set(codes) == {0} and f"stopped     early at step 3: {reason}" in printed


def test_named_evaluation_sets_have_metrics_and_curves_of_their_own(example, forks):
    """A set has the metrics of a run that evaluates on it alone, and one chooses the best checkpoint."""
    rows = example.eval.read_text().splitlines()
    files = [example.folder / "data" / f"set-{name}.jsonl" for name in ("math", "code")]
    for file, some in zip(files, (rows[:5], rows[5:14]), strict=True):
        file.write_text("\n".join(some) + "\n")
    flags = {
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "verify_save": False, "early_stopping_patience": 1,
    }  # fmt: skip
    output = example.folder / "named-sets"
    sets = [f"math={files[0]}", f"code={files[1]}"]
    words = example.words(
        output, eval_data_files=sets, metric_for_best_model="eval_code_nll", generate_samples=3, report=True,
        generate_samples_max_tokens=2, **flags,
    )  # fmt: skip
    codes, printed = forks.run(words, 1)
    assert codes == [0], printed
    log = history(output)
    alone = example.folder / "set-alone"
    codes, text = forks.run(example.words(alone, eval_data_files=files[1], **flags), 1)
    assert codes == [0], text
    for expected in eval_records(alone):
        (record,) = (r for r in log if r["step"] == expected["step"] and "eval_code_nll" in r)
        for key in ("nll", "acc", "loss", "supervised_tokens", "p_histogram"):
            assert record[f"eval_code_{key}"] == expected[f"eval_{key}"], key
    printed_rows = [line for line in printed.splitlines() if line.startswith("eval ")]
    assert [row.split("  ")[-1] for row in printed_rows] == ["math", "code"] * 2
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["best_metric"] == min(r["eval_code_nll"] for r in log if "eval_code_nll" in r)
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    of_step = [sample["file"] for sample in samples if sample["step"] == 2]
    assert of_step == [str(files[0])] * 2 + [str(files[1])], "once per evaluation, of both sets"
    report = json.loads((output / "report.json").read_text())
    assert {conversation["file"] for view in report["tokens"] for conversation in view["conversations"]} == {
        str(files[0])
    }
    page = (output / "report.html").read_text()
    assert "Evaluation on math" in page and "Evaluation on code" in page
    assert "eval_code, step 2" in (output / "README.md").read_text()
