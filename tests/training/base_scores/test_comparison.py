"""p before and after training, token by token."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.report.base_scores_callback import BINS, describe
from dft.report.pages.base_scores import base_scores_views, visible
from dft.training.base_scores.comparison import compare
from dft.training.base_scores.scorer import SequenceScorer
from tests.training.base_scores.scoring_helpers import arguments_of, expected_scores, score, write_rows


@pytest.fixture(scope="module")
def comparison(tiny, tmp_path_factory):
    """Return the data with scores, a model that differs, and their comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    rows = write_rows(folder / "rows.jsonl")
    data = score(tiny, rows, folder, "--drop_tokens_below_base_p", "0.003").datasets["train"]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight *= 8
    model.save_pretrained(folder / "trained")
    training = arguments_of(tiny, rows, folder).training
    sample = data.sample(100, seed=0)
    scorer = SequenceScorer(model, model, training, sample, "auto", 64)
    return data, folder / "trained", compare(scorer, sample)


def test_both_probabilities_are_those_of_the_same_token(comparison, tiny):
    data, trained, compared = comparison
    data.base_filter = None
    before = np.exp([expected for _, expected in expected_scores(tiny, data)])
    after = np.exp([expected for _, expected in expected_scores(trained, data)])
    np.testing.assert_allclose(compared.before, before, atol=1e-5)
    np.testing.assert_allclose(compared.after, after, atol=1e-4)
    assert np.abs(before - after).max() > 0.05


def test_the_report_names_the_tokens_that_changed_most(comparison, tiny):
    _, _, compared = comparison
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    report = describe(compared, "train", 7, tokenizer)
    counts = np.array(report["counts"])
    assert counts.shape == (BINS, BINS) and counts.sum() == len(compared.before) == report["tokens"]
    assert counts[0].sum() == (compared.before < 1 / BINS).sum()  # rows are bins of p before
    change = compared.after - compared.before
    first = report["rises"][0]
    assert first["after"] - first["before"] == pytest.approx(change.max())
    token = int(change.argmax())
    row = compared.sequences[int(compared.row[token])]
    assert first["token"] == tokenizer.decode(row["input_ids"][compared.place[token]])
    assert first["line"] == row["origins"][0][1] and first["file"].endswith("rows.jsonl")
    assert all(example["after"] < example["before"] for example in report["falls"])


def test_the_page_shows_the_shares_that_moved():
    counts = np.zeros((BINS, BINS), dtype=int)
    counts[0, 0], counts[0, 19], counts[19, 0], counts[5, 7] = 5, 3, 1, 1  # 5 to 7: 0.1 higher, not above
    report = {
        "split": "eval", "step": 9, "tokens": 10, "mean_before": 0.25, "mean_after": 0.5,
        "counts": counts.tolist(), "rises": [], "falls": [{"token": "<b>"}],
    }  # fmt: skip
    (view,) = base_scores_views([report])
    assert "more likely (30.0 % by more than 0.1)" in view.caption and "(10.0 %)" in view.caption
    assert "<image" not in view.svg and view.svg.count("<path") > 20
    assert [title for title, _ in view.tables] == ["p fell most"]
    assert base_scores_views(None) == [] == base_scores_views([{"tokens": 0}])
    assert visible(" a b\n ") == "·a b↵·"
