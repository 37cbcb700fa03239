"""The preflight: its statistics against formulas, its advice for strong and weak priors, its page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from dft import DFTTrainer
from dft.errors import UserError
from dft.report.pages.preflight import preflight_page, write_preflight
from dft.report.preflight_advice import (
    SILENCED,
    STRONG,
    UNKNOWN_END,
    WEAK,
    advice,
    preflight_report,
    token_statistics,
)
from dft.report.terminal.preflight import preflight_lines
from dft.training.measuring.scoring import TokenTable
from tests.training.measuring.test_meter import END, Rows, with_end_token
from tests.training.test_trainer import tiny


def table(p, *, target=None, file=None) -> TokenTable:
    p = np.array(p, dtype=float)
    count = len(p)
    return TokenTable(
        nll=-np.log(p),
        entropy=np.linspace(0.5, 1.5, count),
        correct=p > 0.5,
        target=np.array(target if target is not None else [1] * count),
        file=np.array(file if file is not None else [0] * count),
        line=np.arange(1, count + 1),
    )


def report_of(scored: TokenTable, files=("data/a.jsonl", "data/b.jsonl")):
    return preflight_report(scored, files, [END], lambda token: f"<t{token}>", "some/model")


def test_statistics_follow_their_formulas():
    p = [0.9, 0.5, 0.001, 0.25]
    statistics = token_statistics(table(p, target=[END, 1, END, 2]), [END])
    assert statistics["avg_p_correct"] == pytest.approx(np.mean(p))
    assert statistics["nll"] == pytest.approx(-np.mean(np.log(p)))
    assert statistics["p_end_of_turn"] == pytest.approx((0.9 + 0.001) / 2)
    # The 1-norm of softmax - onehot, for a softmax that gives the remaining probability to one other token.
    gradients = [abs(probability - 1) + abs(1 - probability) for probability in p]
    gradient_kept = sum(probability * size for probability, size in zip(p, gradients, strict=True)) / sum(
        gradients
    )
    assert statistics["gradient_kept"] == pytest.approx(gradient_kept)
    assert statistics["silenced_share"] == 0.25
    assert statistics["p_histogram"][18] == statistics["p_histogram"][10] == statistics["p_histogram"][0] == 1
    assert sum(statistics["p_histogram"]) == 4


def test_gradient_kept_agrees_with_autograd():
    """The ratio of the 1-norms of the gradients of the DFT and SFT losses on the logits."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(50, 30, dtype=torch.float64)).requires_grad_()
    target = torch.randint(30, (50,))
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (sft,) = torch.autograd.grad(nll.sum(), logits, retain_graph=True)
    (dft,) = torch.autograd.grad((nll.neg().exp().detach() * nll).sum(), logits)
    statistics = token_statistics(table(nll.neg().exp().detach().numpy()), [])
    assert statistics["gradient_kept"] == pytest.approx((dft.abs().sum() / sft.abs().sum()).item())
    assert statistics["p_end_of_turn"] is None


@pytest.mark.parametrize(
    ("mean", "beginning"),
    [
        (STRONG + 0.01, "DFT fits"), (STRONG - 0.01, "no clear answer"), (WEAK + 0.01, "no clear answer"),
        (WEAK - 0.01, "SFT first"),
    ],
)  # fmt: skip
def test_advice_depends_on_the_mean_probability(mean, beginning):
    (advised,) = report_of(table([mean] * 10))["advice"]
    assert advised["recommendation"].startswith(beginning)
    assert f"{mean:.3f}" in advised["evidence"] and "2510.00526" in advised["source"]
    mixture = "--dft_alpha 0 and 1, and 0.5 between them"
    assert (mixture in advised["recommendation"]) == (beginning == "no clear answer")


def test_an_unknown_end_of_turn_token_causes_advice_to_set_a_floor():
    above = report_of(table([0.9, 0.9, UNKNOWN_END + 0.01], target=[1, 2, END]))["advice"]
    below = report_of(table([0.9, 0.9, UNKNOWN_END - 0.01], target=[1, 2, END]))["advice"]
    assert len(above) == 1 and len(below) == 2
    assert "--dft_alpha 0.9" in below[1]["recommendation"] and "0.0900" in below[1]["evidence"]


def test_files_with_different_priors_are_reported():
    report = report_of(table([0.9] * 3 + [0.02] * 3, file=[0] * 3 + [1] * 3))
    assert report["files"]["a.jsonl"]["avg_p_correct"] == pytest.approx(0.9)
    assert report["files"]["b.jsonl"]["tokens"] == 3
    (of_files,) = [
        advised for advised in report["advice"] if advised["recommendation"].startswith("the files differ")
    ]
    assert "a.jsonl 0.90 (strong prior)" in of_files["evidence"]
    assert "b.jsonl 0.02 (weak" in of_files["evidence"]
    assert advice(report["whole"], {"a.jsonl": report["files"]["a.jsonl"]})[-1] is not of_files


def test_silenced_tokens_are_listed_with_their_occurrences():
    report = report_of(table([SILENCED / 2] * 3 + [0.9, 0.009], target=[4, 4, 5, 4, 6]))
    assert report["whole"]["silenced"][0] == {"token": 4, "shown": "'<t4>'", "silenced": 2, "of": 3}
    assert {entry["token"] for entry in report["whole"]["silenced"]} == {4, 5, 6}
    assert report["whole"]["silenced_share"] == pytest.approx(4 / 5)


def test_advice_before_and_after_training_on_the_data_is_opposite(tmp_path):
    rows = Rows(with_end_token(6))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=60, learning_rate=3e-2, save_strategy="no",
        per_device_train_batch_size=6, disable_tqdm=True, lr_scheduler_type="constant", logging_steps=60,
    )  # fmt: skip
    trainer = DFTTrainer(tiny(), arguments, alpha=0.0, train_dataset=rows, end_of_turn_ids=[END])
    recommendations = []
    for trained in (False, True):
        if trained:
            trainer.train()
        report = preflight_report(trainer.score(rows), rows.files, trainer.end_of_turn_ids, str, "tiny")
        recommendations.append([advised["recommendation"] for advised in report["advice"]])
    before, after = recommendations
    assert before[0].startswith("SFT first") and before[1].startswith("set a floor")
    assert after[0].startswith("DFT fits") and len(after) == 1


def test_printed_lines_hold_every_statistic_of_every_file():
    report = report_of(table([0.9] * 3 + [0.002] * 3, file=[0] * 3 + [1] * 3))
    lines = preflight_lines(report, "runs/x")
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines if re.match(r" {12}(all|[ab]\.jsonl) ", line)]
    statistics, shares, silenced = rows[:3], rows[3:6], rows[6:]
    assert [row[0] for row in statistics] == [row[0] for row in shares] == ["all", "a.jsonl", "b.jsonl"]
    assert statistics[0][1] == "6" and statistics[1][2] == "0.900" and statistics[2][2] == "0.002"
    assert statistics[2][6] == "-" and statistics[2][8] == "100.0%"
    assert [float(share) for share in shares[0][1:11]] == [50.0, *[0.0] * 8, 50.0]
    assert float(shares[1][10]) == float(shares[2][1]) == 100
    assert silenced == [["b.jsonl", "'<t1>'", "3/3"]]
    assert "silenced    all      '<t1>' 3/6" in lines
    assert lines[-1].endswith("runs/x/preflight.json, runs/x/preflight.html")
    assert sum(line.startswith("advice") for line in lines) == len(report["advice"])


def test_nan_probabilities_are_an_error():
    scored = table([0.5, 0.5, 0.5])
    scored.nll[1] = np.nan
    with pytest.raises(
        UserError, match=r"NaN probabilities for 1 of 3 tokens, first in data/a.jsonl:2; its weights"
    ):
        report_of(scored)


def test_the_page_is_self_contained_and_escapes_its_texts(tmp_path):
    scored = table([0.001] * 4, target=[3, 3, 4, END])
    report = preflight_report(scored, ["<b>.jsonl"], [END], lambda token: "</code><script>", "<model>")
    write_preflight(report, tmp_path)
    assert json.loads((tmp_path / "preflight.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "preflight.html").read_text()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img", "iframe", "b.jsonl", "model")
            assert not any(name in ("src", "href") and not value.startswith("#") for name, value in attrs)

    Reader().feed(page)
    assert "&lt;script&gt;" in page and "&lt;model&gt;" in page and page.count("<svg") == 1
    assert "SFT first" in page and "<code>--dft_alpha</code>" in page


def test_each_of_several_files_has_a_histogram():
    report = report_of(table([0.9] * 3 + [0.02] * 3, file=[0] * 3 + [1] * 3))
    assert preflight_page(report).count("<svg") == 3
