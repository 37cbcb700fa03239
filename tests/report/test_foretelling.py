"""What the preflight foretells of objectives: shares against automatic differentiation, and the ranking."""

import re

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from dft import DFTTrainer
from dft.data.batches.swapping import SwappedAnswers
from dft.loss.objectives import OBJECTIVES, make_objective
from dft.report.foretelling import MIN_MARKED, REGIMES, flags_of, foretell, foretold_objectives, score
from dft.report.pages.preflight import preflight_page
from dft.report.preflight import score_sample
from dft.report.terminal.preflight import preflight_lines
from dft.training.first_step import FirstStep
from dft.training.measuring.scoring import TokenTable
from tests.training.measuring.test_meter import END, Rows, with_end_token
from tests.training.test_trainer import tiny

NAMES = list(foretold_objectives())
NOT_COMPUTED = "the model has no trainable weights"


def known(rows=48, seed=0):
    """Return a model with probabilities of all sizes, and rows of two files."""
    model = tiny(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    return model, Rows(with_end_token(rows))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    model, rows = known()
    arguments = TrainingArguments(output_dir=str(tmp_path_factory.mktemp("run")), use_cpu=True, report_to=[])
    return DFTTrainer(model, arguments, train_dataset=rows, end_of_turn_ids=[END])


class Decoder:
    decode = staticmethod(lambda token: f"<t{token}>")


@pytest.fixture(scope="module")
def report(trainer):
    return score_sample(trainer, trainer.train_dataset, Decoder, "tiny", 0)


def logit_gradients(model, rows, objective):
    """Return p, the 1-norm of the gradient on the logits of each token, and its target, in float64."""
    model = model.double().eval()
    p, sizes, targets = [], [], []
    for row in rows.rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits.detach()[:, :-1].double()
        logits.requires_grad_()
        labels = torch.tensor(row["labels"])[1:]
        keep = labels != -100
        nll = torch.nn.functional.cross_entropy(logits[0][keep], labels[keep], reduction="none")
        rows_of = logits[0][keep].detach()
        weight = objective(nll.detach().neg().exp(), rows_of)
        (gradient,) = torch.autograd.grad((weight * nll).sum(), logits)
        p.append(nll.detach().neg().exp())
        sizes.append(gradient[0][keep].abs().sum(-1))
        targets.append(labels[keep])
    return (torch.cat(part).numpy() for part in (p, sizes, targets))


def entropy_weight(p, logits):
    top = logits.topk(20).values.softmax(-1)
    return torch.special.entr(top).sum(-1) / np.log(20)


WEIGHTS = {
    "sft": lambda p, logits: torch.ones_like(p),
    "dft": lambda p, logits: p,
    "dft, alpha 0.5": lambda p, logits: (1 + p) / 2,
    "power": lambda p, logits: p.sqrt(),
    "threshold": lambda p, logits: (p >= 0.1).double(),
    "chord": lambda p, logits: p * (1 - p),
    "luffy": lambda p, logits: 0.1 * p / (p + 0.1) ** 2,
    "eaft": entropy_weight,
    "deft": lambda p, logits: p ** logits.softmax(-1).square().sum(-1),
    "iw_sft": lambda p, logits: torch.ones_like(p),
    "psft": lambda p, logits: torch.ones_like(p),
    "asft": lambda p, logits: p,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_shares_of_the_gradient_agree_with_automatic_differentiation(report, name):
    model, rows = known()
    p, own, targets = logit_gradients(model, rows, WEIGHTS[name])
    _, sft, _ = logit_gradients(model, rows, WEIGHTS["sft"])
    row = report["objectives"]["ranking"][name]
    groups = {
        "low": p < 0.1,
        "middle": (p >= 0.1) & (p < 0.9),
        "high": p >= 0.9,
        "end_of_turn": targets == END,
    }
    assert all(group.any() for group in groups.values())
    for group, mask in groups.items():
        assert row["kept"][group] == pytest.approx(own[mask].sum() / sft[mask].sum(), rel=1e-3), group
        if group != "end_of_turn":
            assert row["shares"][group] == pytest.approx(own[mask].sum() / own.sum(), rel=1e-3)
    assert row["kept"]["all"] == pytest.approx(own.sum() / sft.sum(), rel=1e-3)


def test_weights_are_the_same_with_and_without_the_fused_head(trainer):
    objectives = list(foretold_objectives().values())
    fused = trainer.score(trainer.train_dataset, objectives).weights
    model, rows = known()
    plain = DFTTrainer(
        model, trainer.args, train_dataset=rows, end_of_turn_ids=[END], fused_head="off"
    ).score(rows, objectives)
    assert fused.shape == (len(plain), len(objectives))
    np.testing.assert_allclose(fused, plain.weights, atol=1e-5)
    assert trainer.score(rows).weights is None


def test_weights_of_the_data_multiply_those_of_the_objectives(trainer):
    rows = [dict(row, loss_weights=[0.5] * len(row["input_ids"])) for row in with_end_token(6)]
    weights = trainer.score(Rows(rows), [make_objective("sft")]).weights
    assert (weights == 0.5).all()


def test_a_factor_on_all_weights_of_the_data_does_not_change_the_ranking(trainer, report):
    rows = [dict(row, loss_weights=[4.0] * len(row["input_ids"])) for row in trainer.train_dataset.rows]
    weighted = score_sample(trainer, Rows(rows), Decoder, "tiny", 0)["objectives"]["ranking"]
    assert list(weighted) == list(report["objectives"]["ranking"])
    for name, row in report["objectives"]["ranking"].items():
        assert weighted[name]["score"] == pytest.approx(row["score"], abs=1e-5), name
        assert weighted[name]["largest_weight"] == pytest.approx(row["largest_weight"], abs=1e-5)


def test_answers_are_swapped_within_a_file_and_only_where_they_differ():
    rows = [
        {"input_ids": [1, 2, 3, 9], "labels": [-100, -100, 3, 9], "origins": [(0, 1)]},
        {"input_ids": [1, 5, 6, 9], "labels": [-100, -100, 6, 9], "origins": [(0, 2)]},
        {"input_ids": [1, 7, 3, 9], "labels": [-100, -100, 3, 9], "origins": [(1, 1)]},
        {"input_ids": [1, 8, 3, 9], "labels": [-100, -100, 3, 9], "origins": [(1, 2)]},
    ]
    pairs = SwappedAnswers(rows, 10, 0)
    assert len(pairs) == 4  # the answers of the second file are equal
    sequences = {tuple(row["input_ids"].tolist()): row["origins"][0][1] for row in pairs.rows}
    assert sequences == {(1, 2, 3, 9): 0, (1, 5, 3, 9): 1, (1, 5, 6, 9): 0, (1, 2, 6, 9): 1}
    assert all(row["labels"].tolist() == [-100, -100, *row["input_ids"][2:]] for row in pairs.rows)
    assert [row["origins"][0][0] for row in pairs.rows] == [0, 0, 1, 1]
    assert len(SwappedAnswers(rows, 1, 0)) == 2


def test_only_the_first_answer_of_a_conversation_is_swapped():
    rows = [
        {"input_ids": [1, n, n + 1, 9, 2, n + 2], "labels": [-100, -100, n + 1, 9, -100, n + 2],
         "origins": [(0, n)], "loss_weights": [1, 1, 0.5, 0.5, 1, 1]}
        for n in (10, 20)
    ]  # fmt: skip
    pairs = SwappedAnswers(rows, 10, 0)
    assert {tuple(row["input_ids"].tolist()) for row in pairs.rows} == {
        (1, 10, 11, 9), (1, 20, 11, 9), (1, 20, 21, 9), (1, 10, 21, 9),
    }  # fmt: skip
    assert pairs[0]["loss_weights"].tolist() == [1, 1, 0.5, 0.5]


def table_of(p, *, kinds=None, weights=None, target=None) -> TokenTable:
    """Return a table whose weights are those of the objectives that are functions of p, else 1."""
    p = np.array(p, dtype=float)
    nll = torch.from_numpy(-np.log(p))
    if weights is None:
        columns = []
        for name in NAMES:
            weight = WEIGHTS.get(name) if name not in ("eaft", "deft") else None
            columns.append((weight or WEIGHTS["sft"])(nll.neg().exp(), None).numpy())
        weights = np.stack(columns, 1)
    line = np.zeros(len(p), dtype=int) if kinds is None else np.array(kinds)
    target = np.ones(len(p), dtype=int) if target is None else np.array(target)
    return TokenTable(nll.numpy(), np.ones(len(p)), p > 0.5, target, np.zeros(len(p), int), line, weights)


def swapped_table(count=MIN_MARKED):
    """`count` tokens of p 0.5 that have 0.02 under another question, and as many of p 0.5 under both."""
    return table_of(
        [0.5] * 2 * count + [0.02] * count + [0.5] * count, kinds=[0] * 2 * count + [1] * 2 * count
    )


def test_noise_is_the_share_of_the_gradient_of_swapped_answers_on_tokens_that_depend_on_the_question():
    foretold = foretell(table_of([0.5] * 10), swapped_table(), NOT_COMPUTED, [])
    assert foretold["noise_probe"] == {"pairs": 1, "tokens": 2 * MIN_MARKED, "marked": MIN_MARKED}
    noise = {name: row["noise"] for name, row in foretold["ranking"].items()}
    assert noise["sft"] == pytest.approx(0.98 / (0.98 + 0.5))
    assert noise["dft"] == pytest.approx(0.02 * 0.98 / (0.02 * 0.98 + 0.5 * 0.5))
    assert noise["dft, alpha 0.5"] == pytest.approx(0.51 * 0.98 / (0.51 * 0.98 + 0.75 * 0.5))


def test_too_few_tokens_that_depend_on_the_question_are_named():
    foretold = foretell(table_of([0.5] * 10), swapped_table(MIN_MARKED - 1), NOT_COMPUTED, [])
    reason = foretold["noise_probe"]["not_computed"]
    assert reason.startswith(f"only {MIN_MARKED - 1} of {2 * MIN_MARKED - 2} tokens of answers depend on")
    nothing = foretell(table_of([0.5] * 10), None, NOT_COMPUTED, [])
    assert nothing["noise_probe"]["not_computed"].startswith("the data has no two conversations")
    assert all(row["noise"] is None for row in nothing["ranking"].values())


def test_tokens_whose_p_rounds_to_0_under_both_questions_do_not_depend_on_the_question():
    count = 2 * MIN_MARKED
    table = TokenTable(
        np.full(2 * count, 1e5), np.ones(2 * count), np.zeros(2 * count, bool), np.ones(2 * count, int),
        np.zeros(2 * count, int), np.repeat([0, 1], count), np.ones((2 * count, len(NAMES))),
    )  # fmt: skip
    foretold = foretell(table_of([0.5] * 10), table, NOT_COMPUTED, [])
    assert foretold["noise_probe"]["not_computed"].startswith(f"only 0 of {count} tokens of answers depend")


def test_an_objective_without_a_gradient_on_the_probed_tokens_has_no_share_of_noise():
    count = MIN_MARKED
    swapped = table_of([0.05] * count + [0.01] * count, kinds=[0] * count + [1] * count)
    foretold = foretell(table_of([0.01] * 30 + [0.6]), swapped, NOT_COMPUTED, [])
    ranking = foretold["ranking"]
    assert ranking["threshold"]["noise"] is None
    assert ranking["sft"]["noise"] == pytest.approx(0.99 / (0.99 + 0.95))
    assert ranking["threshold"]["score"] == pytest.approx(foretold["mean_p"] * 0.5)


def test_of_equal_scores_the_objective_that_keeps_more_of_the_gradient_is_recommended():
    """All tokens of a model with a uniform distribution have the same p, and therefore the same weight."""
    foretold = foretell(table_of([0.002] * 40), None, NOT_COMPUTED, [])
    scores = [foretold["ranking"][name]["score"] for name in ("sft", "dft", "chord")]
    assert scores == pytest.approx([0.998] * 3)
    assert foretold["try"][0]["name"] == "sft"


def test_a_weak_prior_ranks_sft_first_and_a_strong_one_dft_before_sft():
    swapped = swapped_table()
    weak = foretell(table_of([0.01] * 30 + [0.6]), swapped, NOT_COMPUTED, [])
    strong = foretell(table_of([0.05] + [0.9] * 30), swapped, NOT_COMPUTED, [])
    assert weak["try"][0]["name"] == "sft" and weak["try"][0]["flags"] == "--dft_alpha 0"
    order = list(strong["ranking"])
    assert order.index("dft") < order.index("sft")
    scores = [row["score"] for row in strong["ranking"].values()]
    assert scores == sorted(scores, reverse=True)


def test_the_score_follows_its_formula():
    row = {"noise": 0.3, "kept": {"low": 0.1}, "largest_weight": 0.5, "shares": {"low": 0.9}}
    assert score(row, 0.8) == pytest.approx(0.8 * 0.7 + 0.2 * 0.2)
    assert score(row, 0.8, has_probe=False) == pytest.approx(0.8 * 0.1 + 0.2 * 0.2)
    assert score(row | {"noise": None}, 0.8) == pytest.approx(0.8 * 0.5 + 0.2 * 0.2)
    assert score(row | {"kept": {"low": None}}, 0.8) == pytest.approx(0.8 * 0.7 + 0.2)
    assert score(row | {"largest_weight": 0.0}, 0.8) == pytest.approx(0.8 * 0.7)


def test_the_two_recommended_differ_and_compare_with_no_earlier_model():
    """iw_sft and psft have SFT's score, and are not recommended beside it."""
    foretold = foretell(table_of([0.01] * 30 + [0.6] * 5), swapped_table(), NOT_COMPUTED, [])
    assert foretold["ranking"]["psft"]["same_first_step_as"] == "sft"
    assert foretold["ranking"]["asft"]["same_first_step_as"] == "dft"
    names = [pick["name"] for pick in foretold["try"]]
    assert len(set(names)) == 2 and not {*names} & {"iw_sft", "psft", "asft"}
    assert all(pick["source"].startswith("arXiv 2") for pick in foretold["try"])


def test_every_objective_has_a_regime_or_the_first_step_of_another():
    rows = foretell(table_of([0.5] * 10), None, NOT_COMPUTED, [])["ranking"]
    assert {*rows} == {*OBJECTIVES, "dft, alpha 0.5"}
    assert {name for name, row in rows.items() if row["same_first_step_as"] is None} == {*REGIMES}
    assert flags_of("talr") == "--objective talr"


def test_an_unlearned_end_of_turn_token_is_part_of_the_reason():
    table = table_of([0.001] * 3 + [0.95] * 60, target=[END] * 3 + [1] * 60)
    foretold = foretell(table, swapped_table(), NOT_COMPUTED, [END])
    first = foretold["try"][0]
    assert first["name"] == "threshold"
    assert first["reason"].endswith(
        "it keeps 0% of SFT's gradient on end-of-turn tokens: add --end_of_turn_weight 0.1"
    )


def test_lines_and_page_show_every_objective_and_what_was_not_computed(report):
    lines = preflight_lines(report, "runs/x")
    assert max(map(len, lines)) <= 100
    ranking = report["objectives"]["ranking"]
    shown = [
        re.split(r" {2,}", line.strip())
        for line in lines
        if re.match(r" {12}\w.* \d\.\d\d(  as \w+)?$", line)
    ]
    assert [row[0] for row in shown] == list(ranking)
    assert float(shown[0][7]) == pytest.approx(next(iter(ranking.values()))["score"], abs=0.005)
    assert sum(line.startswith(("try  ", "and  ")) for line in lines) == 2
    page = preflight_page(report)
    assert all(f'<th scope="row">{name}' in page for name in ranking)
    assert "not computed" not in page and page.count("<svg") == 4  # two files, both together, the shares
    changed = {**report["objectives"], "first_step": {"not_computed": NOT_COMPUTED}}
    page = preflight_page({**report, "objectives": changed})
    assert f"Rise of p: not computed: {NOT_COMPUTED}." in page
    lines = preflight_lines({**report, "objectives": changed}, "runs/x")
    assert f"            rise was not computed: {NOT_COMPUTED}" in lines


def test_first_steps_are_shares_of_the_steepest():
    step = FirstStep(8, 100, 2.0, dict.fromkeys(NAMES, 1.0) | {"threshold": None})
    ranking = foretell(table_of([0.5] * 10), None, step, [])["ranking"]
    assert ranking["dft"]["first_step"] == 0.5 and ranking["threshold"]["first_step"] is None


def test_scores_of_a_batch_without_supervised_tokens_have_no_weights(trainer):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}, *with_end_token(3)]
    table = trainer.score(Rows(rows), [make_objective("dft"), make_objective("eaft")])
    assert table.weights.shape == (len(table), 2)
