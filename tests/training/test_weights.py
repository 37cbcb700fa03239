"""Weights of the data in training and evaluation: loss, gradient and metrics, whatever the batches."""

import copy
import math

import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn.functional import log_softmax

from dft import DFTTrainer, make_objective
from dft.data.batches.collator import PaddedCollator, loss_weights_of
from dft.training.parallel.sequence_parallel import SequenceParallel
from tests.training.test_trainer import conversations, tiny

WEIGHTS = (1.0, 0.3, 2.5)
FLAGS = {"per_device_train_batch_size": 8}
END = 7


def weighted(count: int) -> list[dict[str, list]]:
    """Return sequences with other weights for their last token than for the others."""
    rows = conversations(count)
    for number, row in enumerate(rows):
        weight = WEIGHTS[number % 3]
        row["labels"][-1] = row["input_ids"][-1] = END
        row["loss_weights"] = [weight] * (len(row["labels"]) - 1) + [2 * weight]
    return rows


def packed(rows: list[dict[str, list]]) -> list[dict[str, list]]:
    """Return the sequences in rows of three."""
    groups = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    names = ("input_ids", "labels", "loss_weights")
    joined = [{name: [value for row in group for value in row[name]] for name in names} for group in groups]
    return [
        {**row, "seq_lengths": [len(item["labels"]) for item in group]}
        for row, group in zip(joined, groups, strict=True)
    ]


def run(
    tmp_path, rows, objective=None, fused_head="on", end_of_turn_weight=0.2, **flags
) -> list[dict[str, float]]:
    """Train one epoch and evaluate the model before it. Return the log, the evaluation first."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", seed=5,
        disable_tqdm=True, logging_steps=1, save_strategy="no", eval_strategy="steps", eval_steps=1000,
        eval_on_start=True, num_train_epochs=1, max_grad_norm=1e9, **flags,
    )  # fmt: skip
    objective = objective or make_objective("dft", {"alpha": 0.6})
    turns = {"end_of_turn_ids": [END], "end_of_turn_weight": end_of_turn_weight}
    data = Dataset.from_list(rows)
    trainer = DFTTrainer(
        tiny(), arguments, objective=objective, train_dataset=data, eval_dataset=data, fused_head=fused_head,
        base_model=tiny(1) if objective.kl_weight else None, **turns,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    return [record for record in history if "loss" in record or "eval_loss" in record]


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("name", ["dft", "asft", "chord"])
def test_loss_gradient_and_metrics_match_their_formulas_in_float64(tmp_path, name, fused):
    rows = weighted(8)
    objective = make_objective(name)
    evaluation, record = run(tmp_path, rows, objective, fused, **FLAGS)[:2]
    model, base = copy.deepcopy(tiny()).double(), tiny(1).double()
    loss, descended, sums, count = 0.0, 0.0, dict.fromkeys(("nll", "p", "acc", "weight"), 0.0), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_p, log_base = (log_softmax(each(input_ids=ids).logits[0], -1) for each in (model, base))
        for position, target in enumerate(row["labels"][1:]):
            if target == -100:
                continue
            nll = -log_p[position, target]
            p = math.exp(-nll.item())
            weight = p * (1 - p) if name == "chord" else p
            floor = 0.2 if target == END else 0.0
            factor = row["loss_weights"][position + 1]
            anchor = torch.zeros(())
            if objective.kl_weight:
                here, there = log_p[position], log_base[position].detach()
                anchor = objective.kl_weight * (here.exp() * (here - there)).sum()
            loss += factor * (max(weight, floor) * nll.item() + anchor.item())
            descended = descended + factor * (max(weight, floor) * nll + anchor)
            sums["nll"] += nll.item()
            sums["p"] += p
            sums["acc"] += int(log_p[position].argmax()) == target
            sums["weight"] += factor * max(weight, floor)
            count += 1
    (descended / count).backward()
    norm = math.sqrt(sum(tensor.grad.square().sum().item() for tensor in model.parameters()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for prefix, log in (("", record), ("eval_", evaluation)):
        expected = {"loss": loss, "effective_tokens": sums["weight"]}
        expected |= {"nll": sums["nll"], "avg_p_correct": sums["p"], "acc": sums["acc"]}
        for metric, total in expected.items():
            assert log[prefix + metric] == pytest.approx(total / count, rel=1e-5), metric
        assert log[f"{prefix}supervised_tokens"] == count


def test_the_logged_objective_is_the_weighted_potential(tmp_path):
    rows = weighted(6)
    for row in rows:  # without a lower bound, which is integrated numerically
        row["labels"][-1] = row["input_ids"][-1] = 3
    (evaluation, *_) = run(tmp_path, rows, make_objective("asft", {"kl_weight": 0.5}), **FLAGS)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_p, log_base = (
            log_softmax(each.double()(input_ids=ids).logits[0], -1) for each in (tiny(), tiny(1))
        )
        for position, target in enumerate(row["labels"][1:]):
            if target != -100:
                kl = (log_p[position].exp() * (log_p[position] - log_base[position])).sum().item()
                p = log_p[position, target].exp().item()
                total += row["loss_weights"][position + 1] * (1 - p + 0.5 * kl)
                count += 1
    assert evaluation["eval_objective"] == pytest.approx(total / count, rel=1e-5)


def test_a_step_does_not_depend_on_how_it_is_split(tmp_path):
    rows = weighted(24)
    ways = {
        "whole": (rows, {"per_device_train_batch_size": 24}),
        "split": (rows, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 12}),
        "packed": (packed(rows), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        "logits": (rows, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}),
    }
    logs = {}
    for name, (data, flags) in ways.items():
        head = "off" if name == "logits" else "on"
        logs[name] = run(tmp_path / name, data, fused_head=head, **flags)
    for name, (evaluation, record, *_) in logs.items():
        expected_evaluation, expected, *_ = logs["whole"]
        for metric in ("loss", "nll", "avg_p_correct", "objective", "effective_tokens"):
            assert record[metric] == pytest.approx(expected[metric], rel=1e-5), (name, metric)
            value = evaluation[f"eval_{metric}"]
            assert value == pytest.approx(expected_evaluation[f"eval_{metric}"], rel=1e-5), (name, metric)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), name


def test_rows_of_weight_0_equal_unsupervised_ones_and_weights_of_1_equal_none(tmp_path):
    rows = weighted(9)
    zero, without, ones, plain = (copy.deepcopy(rows) for _ in range(4))
    for index, (row, other, one, bare) in enumerate(zip(zero, without, ones, plain, strict=True)):
        one["loss_weights"] = [1.0] * len(row["labels"])
        del bare["loss_weights"]
        if index % 2:
            row["loss_weights"] = [0.0] * len(row["labels"])
            other["labels"] = [-100] * len(row["labels"])
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "tokens_per_second",
             "peak_memory_gib", "seconds_left"}  # fmt: skip
    for pair in ((zero, without), (ones, plain)):
        first, second = (run(tmp_path, data, **FLAGS) for data in pair)
        assert len(first) == len(second) == 4
        for got, expected in zip(first, second, strict=True):
            for metric in expected.keys() - timed:
                assert got[metric] == pytest.approx(expected[metric], rel=1e-6), metric


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_not_rounded_to_the_dtype_of_deepspeed(dtype):
    """transformers' Trainer converts floating-point inputs; integers stay as they are."""
    batch = PaddedCollator(0)(weighted(3))
    converted = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()
    }
    assert torch.equal(loss_weights_of(converted), loss_weights_of(batch))
    assert 0.3 in loss_weights_of(converted).double().round(decimals=6)


def test_sequence_parallel_ranks_get_the_weights_of_their_targets():
    rows = weighted(5)
    batch = PaddedCollator(0)(rows)
    shares = []
    for rank in range(3):
        sequences = SequenceParallel.__new__(SequenceParallel)
        sequences.size, sequences.rank = 3, rank
        part = sequences.local_slice(batch)
        assert part["loss_weights"].shape == part["labels"].shape
        shares.append(part)
    labels, weights = (torch.cat([part[name] for part in shares], 1) for name in ("labels", "loss_weights"))
    for number, row in enumerate(rows):
        for position, target in enumerate(row["labels"][1:]):
            assert labels[number, position] == target
            if target != -100:
                expected = row["loss_weights"][position + 1]
                assert weights[number, position].item() == pytest.approx(expected)
