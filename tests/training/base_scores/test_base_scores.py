"""Scores of the model before training: exact, cached, resumable, and aligned with every packing."""

import itertools
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dft.arguments.conflicts import check_arguments
from dft.data.batches.base_scores import BaseFilter
from dft.errors import UserError
from dft.training.base_scores import run
from dft.training.base_scores.scorer import SequenceScorer
from dft.training.base_scores.store import ScoreStore
from tests.training.base_scores.scoring_helpers import (
    arguments_of,
    end_id,
    expected_scores,
    score,
    write_rows,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def shared(tiny, data, tmp_path_factory):
    """Return a folder whose cache has the scores, and the data with scores."""
    folder = tmp_path_factory.mktemp("shared")
    return folder, score(tiny, data, folder)


def values_of(scored) -> np.ndarray:
    return np.array(scored.datasets["train"].base_scores.values)


@pytest.mark.parametrize("packing", ["False", "True"])
def test_scores_equal_the_log_softmax_of_all_logits(tiny, data, shared, capsys, packing):
    folder, _ = shared
    scored = score(tiny, data, folder, "--packing", packing)
    assert "tokens read from" in capsys.readouterr().out  # packing does not change the scores
    pairs = expected_scores(tiny, scored.datasets["train"])
    assert len(pairs) == len(values_of(scored)) > 100
    assert max(abs(actual - expected) for actual, expected in pairs) < 1e-5


def test_a_part_of_the_data_keeps_its_scores(tiny, data, shared):
    folder, whole = shared
    part = score(tiny, data, folder, "--max_train_samples", "9").datasets["train"]
    assert len(part) == 9 and part.path != whole.datasets["train"].path
    assert all(abs(actual - expected) < 1e-5 for actual, expected in expected_scores(tiny, part))
    sample = part.sample(4, seed=1)
    assert all("base_logp" in row for row in sample) and len(sample) == 4


def test_other_weights_settings_or_data_are_scored_anew(tiny, data, shared, tmp_path, capsys):
    folder, _ = shared
    changed = shutil.copytree(tiny, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    name = min(name for name, weight in weights.items() if weight.ndim == 2)
    weights[name] = weights[name] * 1.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    other_rows = write_rows(tmp_path / "other.jsonl", 5)
    capsys.readouterr()
    for model, rows, flags in (
        (changed, data, []),
        (tiny, data, ["--bf16", "True"]),
        (tiny, data, ["--attn_implementation", "eager"]),
        (tiny, other_rows, []),
    ):
        score(model, rows, folder, *flags)
        assert "tokens scored in" in capsys.readouterr().out
    score(tiny, data, folder)
    assert "tokens read from" in capsys.readouterr().out


def test_tokens_added_to_unused_rows_are_scored_anew(tiny, data, tmp_path, capsys):
    """Their rows begin as the mean of the others, which changes the probability of every token."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    shutil.copytree(tiny, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    alone = values_of(score(tmp_path / "model", data, tmp_path))
    capsys.readouterr()
    added = values_of(score(tmp_path / "model", data, tmp_path, "--add_tokens", "<think>"))
    assert "tokens scored in" in capsys.readouterr().out
    assert len(alone) == len(added) and (alone != added).any()
    score(tmp_path / "model", data, tmp_path, "--add_tokens", "<think>", "--seed", "5")
    assert "tokens read from" in capsys.readouterr().out


def test_a_killed_scoring_continues(tiny, data, shared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "MIN_TOKENS", 100)
    written, batches = [], []
    write, score_batch = ScoreStore.write_shard, SequenceScorer.score

    def write_three(store, number, scores):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(store, number, scores)

    def count(scorer, positions):
        batches.append(positions)
        return score_batch(scorer, positions)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ScoreStore, "write_shard", write_three)
        score(tiny, data, tmp_path)
    (shards,) = (tmp_path / "cache" / "base_scores").glob("*.shards")
    assert sorted(path.name for path in shards.iterdir()) == ["00000", "00001", "00002"]
    damaged = shards / "00001"
    damaged.write_bytes(bytes(damaged.stat().st_size))  # as after a power failure
    monkeypatch.setattr(SequenceScorer, "score", count)
    scored = score(tiny, data, tmp_path)
    rescored = np.concatenate(batches)
    assert 0 < 24 - len(rescored) < 24
    assert "continuing after" in capsys.readouterr().out
    np.testing.assert_allclose(values_of(scored), values_of(shared[1]), atol=1e-5)
    assert not shards.exists()


def test_a_run_that_was_killed_after_the_last_shard_saves_no_invented_time(tiny, data, tmp_path, monkeypatch):
    """Nothing is left to measure the speed with, so the seconds of the second run alone count."""

    def kill(store, counts, about):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ScoreStore, "complete", kill)
        score(tiny, data, tmp_path)
    clock = SimpleNamespace(monotonic=itertools.count().__next__)  # one second later at each call
    monkeypatch.setattr(run, "time", clock)
    scores = score(tiny, data, tmp_path).datasets["train"].base_scores
    assert ScoreStore(tmp_path / "cache", scores.key).about()["seconds"] == 1


def test_damaged_scores_are_computed_again(tiny, data, tmp_path, shared, capsys):
    scored = score(tiny, data, tmp_path)
    path = scored.datasets["train"].base_scores.path
    path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    assert np.allclose(values_of(score(tiny, data, tmp_path)), values_of(shared[1]), atol=1e-5)
    assert "tokens scored in" in capsys.readouterr().out


def test_adapters_and_unfused_heads_give_the_scores_of_the_model(tiny, data, shared, tmp_path):
    pytest.importorskip("peft")
    at_random = ["--lora_r", "4", "--lora_dropout", "0.5", "--lora_args", '{"init_lora_weights": false}']
    for flags in (at_random, ["--fused_head", "off"]):
        other = values_of(score(tiny, data, tmp_path / flags[0], *flags))
        np.testing.assert_allclose(other, values_of(shared[1]), atol=1e-5)


def test_scores_in_half_precision_are_close(tiny, data, shared, tmp_path):
    halved = values_of(score(tiny, data, tmp_path, "--bf16", "True"))
    assert 0 < np.abs(halved - values_of(shared[1])).mean() < 0.02


@pytest.mark.parametrize("packing", ["False", "True"])
def test_tokens_below_the_bound_are_not_supervised_and_counted(tiny, data, shared, packing):
    folder, _ = shared
    whole = score(tiny, data, folder, "--packing", packing).datasets["train"]
    logp = np.concatenate([row["base_logp"] for row in whole])
    bound = float(np.exp(np.nanmedian(logp)))
    scored = score(tiny, data, folder, "--packing", packing, "--drop_tokens_below_base_p", f"{bound:.9g}")
    end, counts = end_id(tiny), scored.report["base_filter"]
    labels = np.concatenate([row["labels"] for row in whole])
    targets = ~np.isnan(logp)
    low = targets & (logp < math.log(bound))
    assert counts["supervised_tokens"] == targets.sum()
    assert counts["dropped_tokens"] == (low & (labels != end)).sum() > 20
    assert counts["exempt_end_of_turn_tokens"] == (low & (labels == end)).sum() > 0
    assert counts["files"][0]["dropped_tokens"] == counts["dropped_tokens"]
    left = np.concatenate([row["labels"] for row in scored.datasets["train"]])
    kept = np.concatenate([row["base_logp"] for row in scored.datasets["train"]])[left != -100]
    assert ((kept >= math.log(bound)) | (left[left != -100] == end) | np.isnan(kept)).all()
    assert (~np.isnan(kept)).sum() == counts["supervised_tokens"] - counts["dropped_tokens"]
    assert scored.datasets["train"].digest() != whole.digest()


def test_sequences_without_a_token_left_are_left_out(tiny, data, shared, monkeypatch):
    folder, _ = shared
    monkeypatch.setattr(run, "BaseFilter", lambda bound, ends: BaseFilter(bound))  # no token is exempt
    for packing in ("False", "True"):
        whole = score(tiny, data, folder, "--packing", packing).datasets["train"]
        best = [np.exp(row["base_logp"][~np.isnan(row["base_logp"])].max()) for row in whole.unpacked()]
        bound = sorted(best)[10] * (1 - 1e-6)
        scored = score(tiny, data, folder, "--packing", packing, "--drop_tokens_below_base_p", f"{bound:.9g}")
        rows = scored.datasets["train"]
        assert scored.report["base_filter"]["dropped_sequences"] == 10
        assert sum(len(row.get("seq_lengths", [0])) for row in rows) == 14
        assert scored.report["base_filter"]["rows"] == len(rows) < len(whole)
        assert all((row["labels"] != -100).any() for row in rows)
        for row, origins in zip(rows, map(rows.origins, range(len(rows))), strict=True):
            assert np.array_equal(row["origins"], np.array(origins))
    with pytest.raises(UserError, match=r"--drop_tokens_below_base_p 0.999: no supervised token"):
        score(tiny, data, folder, "--drop_tokens_below_base_p", "0.999")


def test_faults_are_reported(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr("dft.training.base_scores.store.free_bytes", lambda folder: 100)
    with pytest.raises(UserError, match=r"--base_scores True: the scores of .* 0 MiB free"):
        score(tiny, data, tmp_path)
    monkeypatch.undo()
    broken = AutoModelForCausalLM.from_pretrained(tiny)
    original = broken.model.norm.forward
    broken.model.norm.forward = lambda hidden: original(hidden) * torch.nan
    monkeypatch.setattr("tests.training.base_scores.scoring_helpers.load_model", lambda *_: broken)
    with pytest.raises(UserError, match="probability that is not a number"):
        score(tiny, data, tmp_path, "--fused_head", "off")


def test_a_model_that_fsdp_will_shard_reads_scores_but_does_not_score(
    tiny, data, shared, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "uses_fsdp", lambda training: True)
    with pytest.raises(UserError, match=r"--base_scores only, without --fsdp"):
        score(tiny, data, tmp_path)
    assert np.array_equal(values_of(score(tiny, data, shared[0])), values_of(shared[1]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prepare_only", "True"], "--base_scores only needs the model"),
        (["--plan", "True"], "--base_scores only and --plan True both end"),
        (["--preflight", "True"], "--base_scores only and --preflight True both end"),
    ],
)
def test_kinds_of_runs_that_conflict(tiny, data, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        check_arguments(arguments_of(tiny, data, tmp_path, "--base_scores", "only", *flags))


def test_flags_that_need_base_scores(tiny, data, tmp_path):
    flags = arguments_of(tiny, data, tmp_path, "--drop_tokens_below_base_p", "0.01")
    check_arguments(flags)
    flags.dft.base_scores = False
    with pytest.raises(UserError, match=r"--drop_tokens_below_base_p 0.01 needs .* add --base_scores True"):
        check_arguments(flags)
