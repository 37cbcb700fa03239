"""--base_scores through the command line: the same on ZeRO-3 ranks, and never from a trained model."""

import json
import shutil

import numpy as np
import pytest

from tests.launching import ROOT


def stored(cache) -> list[np.ndarray]:
    """Return all scores of a cache, those of the most tokens first."""
    files = (cache / "base_scores").glob("*/logp.f32")
    return sorted((np.fromfile(file, dtype=np.float32) for file in files), key=len, reverse=True)


@pytest.fixture(scope="module")
def alone(example, forks):
    """Train with one process; return the cache folder, the flags and the output."""
    output, cache = example.folder / "scored", example.folder / "scored-cache"
    words = example.words(
        output, data_cache_dir=cache, base_scores=True, drop_tokens_below_base_p=0.002, save_strategy="steps",
        save_steps=2, max_steps=4, save_total_limit=None, objective="psft",
        eval_strategy="steps", eval_steps=2, report=True,
    )  # fmt: skip
    codes, printed = forks.run(words)
    assert codes == [0], printed
    return cache, words, printed


def test_zero3_ranks_store_the_same_scores_and_train(example, forks, alone):
    cache, expected = example.folder / "sharded-cache", stored(alone[0])
    words = example.words(
        example.folder / "sharded", data_cache_dir=cache, base_scores=True, use_cpu=True, max_steps=1,
        report=True, deepspeed=ROOT / "ds_config/zero3.json", per_device_eval_batch_size=3,
    )  # fmt: skip
    codes, printed = forks.run(words, ranks=2)
    assert codes == [0, 0], printed
    report = json.loads((example.folder / "sharded" / "report.json").read_text())["base_scores"][0]
    assert report["tokens"] == len(expected[1]) and report["mean_after"] != report["mean_before"]
    assert printed.count("tokens scored in") == 2
    scores = stored(cache)
    assert [len(part) for part in scores] == [len(part) for part in expected]
    for part, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5)


def test_a_resumed_run_is_scored_by_the_untrained_model(alone, forks):
    cache, words, printed = alone
    before = stored(cache)
    assert "base p      " in printed and "PSFT" in printed and "supervised tokens" in printed
    shutil.rmtree(cache / "base_scores")
    codes, printed = forks.run(
        [*words, "--resume_from_checkpoint", "auto", "--overwrite_output_dir", "False"]
    )
    assert codes == [0], printed
    assert printed.count("tokens scored in") == 2
    assert "resum" in printed
    for part, other in zip(stored(cache), before, strict=True):
        assert np.array_equal(part, other)


def test_the_report_compares_p_before_and_after(example, alone):
    cache, _, printed = alone
    (report,) = json.loads((example.folder / "scored" / "report.json").read_text())["base_scores"]
    before = np.exp(stored(cache)[1].astype(np.float64))
    assert report["split"] == "eval" and report["tokens"] == len(before)
    assert report["mean_before"] == pytest.approx(before.mean(), rel=1e-4)
    assert report["mean_after"] != pytest.approx(report["mean_before"], rel=1e-3)
    assert f"mean p of {len(before):,} eval tokens: {before.mean():.4f} before training" in printed
    page = (example.folder / "scored" / "report.html").read_text()
    assert "Before and after training" in page and "Tokens whose p rose most" in page


def test_the_start_the_report_and_the_model_card_count_only_what_is_trained(example, alone):
    folder = example.folder / "scored"
    report = json.loads((folder / "data_report.json").read_text())
    train, counts = report["train"], report["base_filter"]
    assert counts["dropped_tokens"] > 100 and counts["dropped_sequences"] == train["rows"] - counts["rows"]
    per_step = 8 * (train["supervised_tokens"] - counts["dropped_tokens"]) / counts["rows"]
    assert f"about {per_step:,.0f} supervised tokens" in alone[2]
    sentence = f"{counts['dropped_tokens']:,} of {counts['supervised_tokens']:,} supervised tokens"
    for text in (alone[2], (folder / "README.md").read_text(), (folder / "report.html").read_text()):
        assert text.count(sentence) == 1


def test_every_evaluation_set_is_compared_under_the_weights_that_are_saved(example, forks, alone):
    """The best step is not the last one, and the model that is saved is the average there."""
    lines = example.eval.read_text().splitlines(keepends=True)
    sets = {"a": lines[:15], "b": lines[15:]}
    files = {name: example.folder / f"set-{name}.jsonl" for name in sets}
    for name, file in files.items():
        file.write_text("".join(sets[name]))
    output = example.folder / "sets"
    words = example.words(
        output, data_cache_dir=alone[0], base_scores=True, report=True, max_steps=3, learning_rate=0.3,
        eval_data_files=[f"{name}={file}" for name, file in files.items()], eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_a_nll", greater_is_better=False, ema_decay=0.5,
    )  # fmt: skip
    codes, printed = forks.run(words)
    assert codes == [0], printed
    report = json.loads((output / "report.json").read_text())
    best = json.loads((output / "trainer_state.json").read_text())["best_global_step"]
    assert 0 < best < 3
    compared = {entry["split"]: entry for entry in report["base_scores"]}
    assert list(compared) == ["eval_a", "eval_b"]
    page = (output / "report.html").read_text()
    for split, entry in compared.items():
        name = f"{split}_avg_p_correct"
        evaluated = {record["step"]: record[name] for record in report["log"] if name in record}
        assert entry["step"] == best
        assert entry["mean_after"] == pytest.approx(evaluated[best], rel=1e-4)
        assert f"supervised tokens of the {split} data" in page


def test_only_scores_and_exits(example, forks, alone):
    output = example.folder / "only"
    words = example.words(output, data_cache_dir=alone[0], base_scores="only", packing=True)
    codes, printed = forks.run(words)
    assert codes == [0], printed
    assert printed.count("tokens read from") == 2
    assert not (output / "model.safetensors").exists() and "optimizer steps" not in printed
