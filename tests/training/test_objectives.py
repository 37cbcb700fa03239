"""Metrics that the trainer logs for each objective, compared with the formulas in float64."""

import copy
import math

import pytest
import torch
from transformers import TrainingArguments

from dft import DFTTrainer, make_objective
from dft.loss.schedule import AlphaSchedule
from dft.training.checkpoints.run_state import RunFacts
from tests.loss.test_objectives import CASES
from tests.training.measuring.test_meter import END, with_end_token
from tests.training.test_trainer import tiny


def distributions(model, rows) -> list[tuple[torch.Tensor, int]]:
    """Return the float64 distribution at each supervised token, and the token."""
    model = copy.deepcopy(model).double().eval()
    tokens = []
    for row in rows:
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].softmax(-1)
        tokens += [
            (probabilities[at], target) for at, target in enumerate(row["labels"][1:]) if target != -100
        ]
    return tokens


def trainer(tmp_path, rows, **options) -> DFTTrainer:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4,
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", max_steps=1,
    )  # fmt: skip
    return DFTTrainer(
        tiny(), arguments, train_dataset=rows, eval_dataset=rows, end_of_turn_ids=[END], **options
    )


def perturbed() -> torch.nn.Module:
    """Return a model that differs from the trained one."""
    model = tiny()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def with_scores(rows: list[dict]) -> list[dict]:
    """Return the sequences with the log-probabilities of `perturbed`."""
    scores = iter(
        [math.log(distribution[target]) for distribution, target in distributions(perturbed(), rows)]
    )
    return [
        {
            **row,
            "base_logp": [math.nan, *(math.nan if t == -100 else next(scores) for t in row["labels"][1:])],
        }
        for row in rows
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.objective.title)
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_metrics_match_the_formulas_of_the_objective(tmp_path, case, fused, floor):
    rows, kl_weight = with_end_token(9), case.objective.kl_weight
    base = perturbed() if kl_weight else None
    if case.objective.needs_base_logp:
        rows = with_scores(rows)
    run = trainer(
        tmp_path, rows, objective=case.objective, fused_head=fused, end_of_turn_weight=floor, base_model=base
    )
    tokens = distributions(run.model, rows)
    others = distributions(perturbed(), rows)
    weights, losses, kls = [], [], []
    for (distribution, target), (other, _) in zip(tokens, others, strict=True):
        p = distribution[target].item()
        scores = [other[target].item()] if case.objective.needs_base_logp else []
        weight = case.weight(distribution, p, *scores)
        weights.append(max(weight, floor) if target == END else weight)
        losses.append(-weights[-1] * math.log(p))
        kls.append((distribution * (distribution / other).log()).sum().item() if kl_weight else 0.0)
    count = len(tokens)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx((sum(losses) + kl_weight * sum(kls)) / count, rel=1e-5)
    assert metrics["eval_effective_tokens"] == pytest.approx(sum(weights) / count, rel=1e-5)
    assert ("eval_kl" in metrics) == (kl_weight > 0)
    if kl_weight:
        assert metrics["eval_kl"] == pytest.approx(sum(kls) / count, rel=1e-4)
    assert ("eval_objective" in metrics) == (case.potential is not None)
    if case.potential is not None and not floor:
        potential = sum(case.potential(distribution[target].item()) for distribution, target in tokens)
        assert metrics["eval_objective"] == pytest.approx(
            (potential + kl_weight * sum(kls)) / count, rel=1e-5
        )


def test_resuming_with_a_different_objective_prints_a_warning(tmp_path):
    rows = with_end_token(9)
    recorder = trainer(tmp_path, rows, alpha=0.5, end_of_turn_weight=0.25)._run.recorder
    before = recorder.method()
    assert before == "DFT, alpha 0.5; end-of-turn tokens weigh at least 0.25"
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    facts = RunFacts(args, rows, method=before)
    manifest = facts.manifest(step=1, resumable=True)
    assert facts.differences(manifest) == []
    rising = trainer(tmp_path, rows, alpha=0.5, alpha_schedule=AlphaSchedule("linear", 0.25))._run.recorder
    other = RunFacts(args, rows, method=rising.method())
    (line,) = other.differences(manifest)
    assert (
        f"was trained by {before}, and this run continues by DFT, alpha 0.5 after a linear rise over 25 % of "
        "the steps" in line
    )
    assert line.endswith(" steps)")
    del manifest["method"]  # as in checkpoints of earlier versions
    assert other.differences(manifest) == []


def test_the_base_model_stays_frozen(tmp_path):
    base, rows = perturbed(), with_end_token(9)
    before = copy.deepcopy(base.state_dict())
    run = trainer(tmp_path, rows, objective=make_objective("asft", {"kl_weight": 1}), base_model=base)
    start = copy.deepcopy(run.model.state_dict())
    run.train()
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.parameters())
    assert any(not torch.equal(start[key], value) for key, value in run.model.state_dict().items())


def test_invalid_combinations_are_rejected(tmp_path):
    rows = with_end_token(3)
    with pytest.raises(ValueError, match="needs the logits or hidden states of a base model"):
        trainer(tmp_path, rows, objective=make_objective("asft"))
    with pytest.raises(ValueError, match="does not use a base model"):
        trainer(tmp_path, rows, base_model=perturbed())
    with pytest.raises(ValueError, match="has no alpha"):
        trainer(tmp_path, rows, objective=make_objective("sft"), alpha_schedule=AlphaSchedule("linear"))
    with pytest.raises(ValueError, match=r"end_of_turn_weight must lie in \[0, 1\], got 3"):
        trainer(tmp_path, rows, end_of_turn_weight=3)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="end_of_turn_weight needs end_of_turn_ids"):
        DFTTrainer(tiny(), arguments, train_dataset=rows, end_of_turn_weight=0.5)
