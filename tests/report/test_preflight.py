"""The preflight: its numbers against formulas, its advice for models that know much and little, its page."""

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
    numbers_of,
    preflight_report,
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


def report_of(given: TokenTable, files=("data/a.jsonl", "data/b.jsonl")):
    return preflight_report(given, files, [END], lambda token: f"<t{token}>", "some/model")


def test_numbers_are_those_of_their_formulas():
    p = [0.9, 0.5, 0.001, 0.25]
    numbers = numbers_of(table(p, target=[END, 1, END, 2]), [END])
    assert numbers["avg_p_correct"] == pytest.approx(np.mean(p))
    assert numbers["nll"] == pytest.approx(-np.mean(np.log(p)))
    assert numbers["p_end_of_turn"] == pytest.approx((0.9 + 0.001) / 2)
    # The 1-norm of softmax - onehot, for a softmax that gives the rest to one other token.
    gradients = [abs(one - 1) + abs(1 - one) for one in p]
    kept = sum(one * size for one, size in zip(p, gradients, strict=True)) / sum(gradients)
    assert numbers["gradient_kept"] == pytest.approx(kept)
    assert numbers["silenced_share"] == 0.25
    assert numbers["p_histogram"][18] == numbers["p_histogram"][10] == numbers["p_histogram"][0] == 1
    assert sum(numbers["p_histogram"]) == 4


def test_what_the_weight_keeps_is_what_it_keeps_of_real_gradients():
    """Against autograd: the 1-norm on the logits of DFT's loss over that of SFT's."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(50, 30, dtype=torch.float64)).requires_grad_()
    target = torch.randint(30, (50,))
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (sft,) = torch.autograd.grad(nll.sum(), logits, retain_graph=True)
    (dft,) = torch.autograd.grad((nll.neg().exp().detach() * nll).sum(), logits)
    numbers = numbers_of(table(nll.neg().exp().detach().numpy()), [])
    assert numbers["gradient_kept"] == pytest.approx((dft.abs().sum() / sft.abs().sum()).item())
    assert numbers["p_end_of_turn"] is None


@pytest.mark.parametrize(
    ("mean", "begins"),
    [
        (STRONG + 0.01, "DFT fits"), (STRONG - 0.01, "no clear answer"), (WEAK + 0.01, "no clear answer"),
        (WEAK - 0.01, "SFT first"),
    ],
)  # fmt: skip
def test_the_advice_goes_by_the_mean_probability(mean, begins):
    (given,) = report_of(table([mean] * 10))["advice"]
    assert given["recommendation"].startswith(begins)
    assert f"{mean:.3f}" in given["evidence"] and "2510.00526" in given["source"]


def test_an_unknown_end_of_turn_asks_for_a_floor():
    known = report_of(table([0.9, 0.9, UNKNOWN_END + 0.01], target=[1, 2, END]))["advice"]
    unknown = report_of(table([0.9, 0.9, UNKNOWN_END - 0.01], target=[1, 2, END]))["advice"]
    assert len(known) == 1 and len(unknown) == 2
    assert "--dft_alpha 0.9" in unknown[1]["recommendation"] and "0.0900" in unknown[1]["evidence"]


def test_files_of_different_priors_are_told_apart():
    report = report_of(table([0.9] * 3 + [0.02] * 3, file=[0] * 3 + [1] * 3))
    assert report["files"]["a.jsonl"]["avg_p_correct"] == pytest.approx(0.9)
    assert report["files"]["b.jsonl"]["tokens"] == 3
    (told,) = [one for one in report["advice"] if one["recommendation"].startswith("the files differ")]
    assert "a.jsonl 0.90 (strong prior)" in told["evidence"] and "b.jsonl 0.02 (weak" in told["evidence"]
    assert advice(report["whole"], {"a.jsonl": report["files"]["a.jsonl"]})[-1] is not told


def test_the_tokens_that_would_be_silenced_are_named_with_how_often_they_occur():
    report = report_of(table([SILENCED / 2] * 3 + [0.9, 0.009], target=[4, 4, 5, 4, 6]))
    assert report["whole"]["silenced"][0] == {"token": 4, "shown": "'<t4>'", "silenced": 2, "of": 3}
    assert {one["token"] for one in report["whole"]["silenced"]} == {4, 5, 6}
    assert report["whole"]["silenced_share"] == pytest.approx(4 / 5)


def test_a_model_that_knows_the_data_and_one_that_does_not_get_opposite_advice(tmp_path):
    rows = Rows(with_end_token(6))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=60, learning_rate=3e-2, save_strategy="no",
        per_device_train_batch_size=6, disable_tqdm=True, lr_scheduler_type="constant", logging_steps=60,
    )  # fmt: skip
    trainer = DFTTrainer(tiny(), arguments, alpha=0.0, train_dataset=rows, end_of_turn_ids=[END])
    told = []
    for trained in (False, True):
        if trained:
            trainer.train()
        report = preflight_report(trainer.score(rows), rows.files, trainer.end_of_turn_ids, str, "tiny")
        told.append([one["recommendation"] for one in report["advice"]])
    assert told[0][0].startswith("SFT first") and told[0][1].startswith("put a floor")
    assert told[1][0].startswith("DFT fits") and len(told[1]) == 1


def test_the_lines_for_a_terminal_have_every_number_of_every_file():
    report = report_of(table([0.9] * 3 + [0.002] * 3, file=[0] * 3 + [1] * 3))
    lines = preflight_lines(report, "runs/x")
    rows = [line.split() for line in lines if re.match(r" {12}(all|[ab]\.jsonl) ", line)]
    numbers, shares, silenced = rows[:3], rows[3:6], rows[6:]
    assert [row[0] for row in numbers] == [row[0] for row in shares] == ["all", "a.jsonl", "b.jsonl"]
    assert numbers[0][1] == "6" and numbers[1][2] == "0.900" and numbers[2][2] == "0.002"
    assert numbers[2][6] == "-" and numbers[2][8] == "100.0%"
    assert [float(share) for share in shares[0][1:11]] == [50.0, *[0.0] * 8, 50.0]
    assert float(shares[1][10]) == float(shares[2][1]) == 100
    assert silenced == [["b.jsonl", "'<t1>'", "3/3"]]
    assert "silenced    all      '<t1>' 3/6" in lines
    assert lines[-1].endswith("runs/x/preflight.json, runs/x/preflight.html")
    assert sum(line.startswith("advice") for line in lines) == len(report["advice"])


def test_probabilities_that_are_not_numbers_are_one_error():
    given = table([0.5, 0.5, 0.5])
    given.nll[1] = np.nan
    with pytest.raises(
        UserError, match=r"not numbers for 1 of 3 tokens, first in data/a.jsonl:2; its weights"
    ):
        report_of(given)


def test_the_page_is_one_file_and_escapes_what_it_shows(tmp_path):
    given = table([0.001] * 4, target=[3, 3, 4, END])
    report = preflight_report(given, ["<b>.jsonl"], [END], lambda token: "</code><script>", "<model>")
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


def test_several_files_have_a_histogram_each():
    report = report_of(table([0.9] * 3 + [0.02] * 3, file=[0] * 3 + [1] * 3))
    assert preflight_page(report).count("<svg") == 3
