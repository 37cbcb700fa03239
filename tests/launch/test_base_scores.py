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
    report = json.loads((example.folder / "sharded" / "report.json").read_text())["base_scores"]
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
    report = json.loads((example.folder / "scored" / "report.json").read_text())["base_scores"]
    before = np.exp(stored(cache)[1].astype(np.float64))
    assert report["split"] == "eval" and report["tokens"] == len(before)
    assert report["mean_before"] == pytest.approx(before.mean(), rel=1e-4)
    assert report["mean_after"] != pytest.approx(report["mean_before"], rel=1e-3)
    assert f"mean p of {len(before):,} eval tokens: {before.mean():.4f} before training" in printed
    page = (example.folder / "scored" / "report.html").read_text()
    assert "Before and after training" in page and "Tokens whose p rose most" in page


def test_only_scores_and_exits(example, forks, alone):
    output = example.folder / "only"
    words = example.words(output, data_cache_dir=alone[0], base_scores="only", packing=True)
    codes, printed = forks.run(words)
    assert codes == [0], printed
    assert printed.count("tokens read from") == 2
    assert not (output / "model.safetensors").exists() and "optimizer steps" not in printed
