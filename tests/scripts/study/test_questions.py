"""The measurements behind docs/questions.md, and its tables, picture and figures in the text."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dft.errors import UserError
from scripts.study import questions, questions_results, study_results
from tests.launching import ROOT

PAGE = ROOT / "docs" / "questions.md"


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "docs/questions.json").read_text())


def test_both_losses_of_tokens_of_known_probability():
    """p = 1/2 and 1/4: nll is log 2 and 2 log 2, the DFT loss of each is log(2) / 2."""
    scores = questions.describe(torch.tensor([0.5, 0.25], dtype=torch.float64).log().neg())
    assert scores["tokens"] == 2 and scores["avg_p_correct"] == pytest.approx(0.375)
    assert scores["nll"] == pytest.approx(1.5 * math.log(2))
    assert scores["dft_loss"] == pytest.approx(math.log(2) / 2)
    extremes = questions.describe(torch.tensor([0.01, 0.04, 0.5, 0.96], dtype=torch.float64).log().neg())
    assert (extremes["below_0.05"], extremes["above_0.95"]) == (0.5, 0.25)


def test_the_dft_loss_is_smaller_by_more_than_one_over_mean_p_and_at_most_one_over_e():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        scores = questions.describe(scale * torch.rand(1000, generator=generator, dtype=torch.float64))
        assert scores["nll"] / scores["dft_loss"] > 1 / scores["avg_p_correct"]
        assert scores["dft_loss"] <= 1 / math.e


def test_changes_are_grouped_by_probability_before_training():
    before = torch.tensor([0.001, 0.3, 0.4, 0.99]).log().neg()
    after = torch.tensor([0.0001, 0.6, 0.2, 0.99]).log().neg()
    groups = dict(zip(questions_results.GROUPS, questions.changes(before, after), strict=True))
    assert groups["0 to 0.01"]["share"] == 0.25 and groups["0 to 0.01"]["rose"] == 1
    middle = groups["0.2 to 0.5"]
    assert (middle["share"], middle["rose"]) == (0.5, 0.5)
    assert middle["p_after"] == pytest.approx(0.4)
    assert middle["nll_after"] == pytest.approx(-(math.log(0.6) + math.log(0.2)) / 2)
    assert groups["0.95 to 1"]["rose"] == 0


def test_token_nll_is_that_of_the_supervised_tokens(tmp_path, monkeypatch):
    """A model whose logits do not depend on the input: token 1 has p = 3/4, the others 1/8 each."""
    logits = torch.tensor([1 / 8, 3 / 4, 1 / 8]).log()

    class Constant(torch.nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": logits.expand(*input_ids.shape, 3)})

    monkeypatch.setattr(questions, "load_for_sampling", lambda *_: Constant())
    rows = [
        {"input_ids": np.array([0, 1, 2], dtype=np.int32), "labels": np.array([-100, 1, 2], dtype=np.int32)},
        {"input_ids": np.array([2, 1], dtype=np.int32), "labels": np.array([-100, 1], dtype=np.int32)},
    ]
    nll = questions.token_nll(tmp_path, rows)
    assert nll.neg().exp().tolist() == pytest.approx([3 / 4, 1 / 8, 3 / 4])


def test_a_folder_without_the_data_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"--gsm8k .* has no train.chatml.jsonl; name the folder of GSM8K"):
        questions.Comparison(tmp_path / "output", tmp_path, questions.QUICK)


def test_scores_of_tokens_agree_with_the_evaluations_of_the_trainer(results):
    """The same held-out tokens, scored by two programs."""
    assert results["size"] == json.loads(json.dumps(questions.FULL._asdict()))
    for name, records in results["curves"].items():
        scores, last = results["scores"][name], records[-1]
        assert last["step"] == results["size"]["steps"]
        assert scores["nll"] == pytest.approx(last["nll"], rel=1e-3)
        assert scores["avg_p_correct"] == pytest.approx(last["avg_p_correct"], rel=1e-3)
        assert records[0]["nll"] == pytest.approx(results["scores"]["base"]["nll"], rel=1e-3)
        if name.startswith("DFT"):
            assert scores["dft_loss"] == pytest.approx(last["loss"], rel=1e-3)
            assert 1 - scores["avg_p_correct"] == pytest.approx(last["objective"], rel=1e-3)


def test_the_page_shows_the_tables_and_the_picture_of_the_results(results):
    text = PAGE.read_text()
    for table in questions_results.tables(results).strip().split("\n\n"):
        assert table in text
    with Image.open(ROOT / "docs/images/questions.png") as picture:
        assert picture.text[study_results.DIGEST] == study_results.digest_of(results)


def test_figures_in_the_text_of_the_page_are_those_of_the_results(results):
    text = re.sub(r"\s+", " ", PAGE.read_text())
    for phrase in questions_results.phrases(results):
        assert phrase in text


@pytest.mark.slow
def test_a_quick_run_measures_everything(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name, first in (("train", 0), ("test", 100)):
        rows = []
        for number in range(first, first + 80):
            answer = f"{number} + 2 = {number + 2}\n#### {number + 2}"
            turns = [{"role": "user", "content": f"{number} + 2"}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": turns}) + "\n")
        (data / f"{name}.chatml.jsonl").write_text("".join(rows))
    monkeypatch.setattr("sys.argv", ["questions.py", str(tmp_path / "out"), "--gsm8k", str(data), "--quick"])
    questions.main()
    results = json.loads((tmp_path / "out/questions.json").read_text())
    assert set(results["scores"]) == {"random weights", "base", "SFT-all", "DFT-all", "SFT-LoRA", "DFT-LoRA"}
    losses = [scores["nll"] for scores in results["scores"].values()]
    assert len(set(losses)) == len(losses), "each run changes the model in its own way"
    assert (tmp_path / "out/loss.png").stat().st_size > 10_000
