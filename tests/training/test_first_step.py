"""The first step of objectives: against automatic differentiation of whole logits and finite differences."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from dft import DFTTrainer
from dft.labels import IGNORE_INDEX
from dft.loss.objectives import OBJECTIVES, Dft, Sft, make_objective
from dft.report.foretelling import foretold_objectives
from dft.training.first_step import FirstStep, choose_halves
from tests.training.test_trainer import conversations, tiny

LIMIT = 512


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> DFTTrainer:
    return make_trainer(tmp_path_factory.mktemp("run"))


def make_trainer(folder, **options) -> DFTTrainer:
    model = tiny().double()
    with torch.no_grad():  # so that some targets have a high p, and all weights differ
        model.lm_head.weight.mul_(60)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    return DFTTrainer(model, arguments, train_dataset=conversations(40), end_of_turn_ids=[7], **options)


def mean_p(model, rows) -> torch.Tensor:
    """Return the mean probability of the supervised tokens, from whole logits, row by row."""
    values = []
    for row in rows:
        logp = model(input_ids=torch.tensor(row["input_ids"])[None].long()).logits[0].log_softmax(-1)
        labels = torch.tensor(row["labels"])[1:].long()
        keep = labels != IGNORE_INDEX
        values.append(logp[:-1][keep].gather(1, labels[keep][:, None]).exp())
    return torch.cat(values).mean()


def nll_gradient(model, rows, weight_of) -> list[torch.Tensor]:
    """Return the gradient of the weighted mean nll, from whole logits."""
    model.zero_grad()
    losses = []
    for row in rows:
        logp = model(input_ids=torch.tensor(row["input_ids"])[None].long()).logits[0].log_softmax(-1)
        labels = torch.tensor(row["labels"])[1:].long()
        keep = labels != IGNORE_INDEX
        nll = -logp[:-1][keep].gather(1, labels[keep][:, None]).squeeze(1)
        losses.append(weight_of(nll.detach().neg().exp(), logp[:-1][keep].detach().exp()) * nll)
    torch.cat(losses).mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


WEIGHTS = {
    "sft": lambda p, probs: torch.ones_like(p),
    "dft": lambda p, probs: p,
    "dft, alpha 0.5": lambda p, probs: 0.5 * p + 0.5,
    "power": lambda p, probs: p.sqrt(),
    "threshold": lambda p, probs: (p >= 0.1).double(),
    "chord": lambda p, probs: p * (1 - p),
    "deft": lambda p, probs: p ** probs.square().sum(-1),
    "psft": lambda p, probs: torch.ones_like(p),
    "asft": lambda p, probs: p,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_derivative_agrees_with_gradients_of_whole_logits(trainer, name):
    """In float64, with the weights written out here."""
    rows = conversations(40)
    step = trainer.first_step(rows, foretold_objectives(), 0)
    first, second = choose_halves(rows, LIMIT, 0)
    model = copy.deepcopy(trainer.model)
    gradient = nll_gradient(model, first, WEIGHTS[name])
    model.zero_grad()
    mean_p(model, second).backward()
    product = sum(
        (-parameter.grad * part).sum() for parameter, part in zip(model.parameters(), gradient, strict=True)
    )
    norm = sum(part.square().sum() for part in gradient).sqrt()
    assert step.rise[name] == pytest.approx((product / norm).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["sft", "dft", "deft"])
def test_the_derivative_agrees_with_a_finite_difference(trainer, name):
    """Mean p of the second half, after steps of both signs along the normalized gradient of the first."""
    rows = conversations(40)
    step = trainer.first_step(rows, {name: make_objective(name)}, 0)
    first, second = choose_halves(rows, LIMIT, 0)
    model = copy.deepcopy(trainer.model)
    gradients = nll_gradient(model, first, WEIGHTS[name])
    norm = sum(part.square().sum() for part in gradients).sqrt()
    means, size = [], 1e-4  # the model normalizes in float32, whose rounding a smaller step would show
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), gradients, strict=True):
                parameter -= sign * size * part / norm
            means.append(mean_p(moved, second).item())
    assert step.rise[name] == pytest.approx((means[0] - means[1]) / (2 * size), rel=1e-3)


def test_nothing_is_changed(trainer):
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.first_step(conversations(40), foretold_objectives(), 0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.optimizer is None


def test_shares_are_cosines(trainer):
    """Along its own gradient on the same tokens, DFT has the steepest rise; the halves differ here."""
    step = trainer.first_step(conversations(40), foretold_objectives(), 0)
    assert isinstance(step, FirstStep) and step.sequences == 32 and step.rise.keys() == step.shares().keys()
    assert {*OBJECTIVES, "dft, alpha 0.5"} == step.rise.keys()
    assert all(-1 <= share <= 1 for share in step.shares().values())
    same = [conversations(1, seed=3)[0]] * 2
    assert trainer.first_step(same, {"dft": Dft()}, 0).shares()["dft"] == pytest.approx(1)


def test_only_trainable_weights_count(tmp_path):
    trainer = make_trainer(tmp_path)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = "q_proj" in name
    step = trainer.first_step(conversations(40), {"sft": Sft()}, 0)
    whole = make_trainer(tmp_path).first_step(conversations(40), {"sft": Sft()}, 0)
    assert 0 < step.steepest < 0.5 * whole.steepest
    trainer.model.requires_grad_(False)
    assert trainer.first_step(conversations(40), {"sft": Sft()}, 0) == "the model has no trainable weights"


def test_what_the_gradient_is_not_computed_for_is_named(tmp_path):
    trainer = make_trainer(tmp_path, end_of_turn_weight=0.1)
    reason = trainer.first_step(conversations(40), {"sft": Sft()}, 0)
    assert reason == "--end_of_turn_weight changes the gradient of every objective; leave it out"
    trainer = make_trainer(tmp_path)
    prompts = [{"input_ids": [1, 2], "labels": [-100, -100]}] * 3
    reason = trainer.first_step(prompts, {"sft": Sft()}, 0)
    needs = "it needs two sequences with a supervised token among their first 512 tokens, and the sample has"
    assert reason == f"{needs} 0 of them"
    assert trainer.first_step([*prompts, *conversations(1)], {"sft": Sft()}, 0) == f"{needs} 1 of them"
    trainer.model.half()
    assert trainer.first_step(conversations(4), {"sft": Sft()}, 0).startswith("float16 gradients need")


def test_memory_that_runs_out_is_named_and_its_gradients_are_freed(trainer, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dft.training.first_step.inner", fail)
    reason = trainer.first_step(conversations(40), {"sft": Sft()}, 0)
    assert reason == "memory ran out for the gradients"
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_halves_are_disjoint_bounded_and_cut():
    rows = [{"input_ids": list(range(100 * n, 100 * n + 60)), "labels": [-100, *[1] * 59]} for n in range(9)]
    first, second = choose_halves(rows, 130, 0)
    assert len(first) == len(second) == 2
    starts = [int(row["input_ids"][0]) for row in (*first, *second)]
    assert len(set(starts)) == 4
    first, second = choose_halves(rows, 40, 0)
    assert [len(row["input_ids"]) for row in (*first, *second)] == [40, 40]
    late = [{"input_ids": list(range(60)), "labels": [-100] * 50 + [1] * 10}] * 3
    assert choose_halves(late, 40, 0) == ([], [])
