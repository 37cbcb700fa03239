"""Every objective on the command line: training lowers it, however its steps are split."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dft.errors import EXIT_USER_ERROR
from dft.loss.objectives import OBJECTIVES
from dft.loss.objectives.base import Objective
from tests.combinations import proves
from tests.launching import ROOT, eval_records, train_records
from tests.loss.test_objectives import CASES

FLAGS = {
    "max_train_samples": 64, "num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True,
    "eval_strategy": "epoch", "eval_on_start": True, "learning_rate": 1e-3, "fused_head": "on",
}  # fmt: skip
COMPARED = {"loss", "objective", "kl", "grad_norm", "effective_tokens", "eval_loss", "eval_kl"}
QUICK = ("DFT", "SFT", "POWER (k 3)", "EAFT", "ASFT (kl_weight 2)")
"""Titles of the objectives that the default run launches: without parameters and with, without a potential,
with a divergence. The others differ in their weights, which tests/loss and tests/training check."""
FORMS = {
    "zero3": {"deepspeed": ROOT / "ds_config/zero3.json"},
    "zero2": {"deepspeed": ROOT / "ds_config/zero2.json"},
    "ddp": {},
    "fsdp2": {"fsdp": True},
}


def flags_of(objective: Objective) -> dict[str, object]:
    """Return the command-line flags that select an objective."""
    scores = {"base_scores": True} if objective.needs_base_logp else {}
    parameters = {name: value for name, value in vars(objective).items() if name != "alpha"}
    words = {"objective": objective.name}
    if parameters:
        words["objective_args"] = ",".join(f"{name}={value:g}" for name, value in parameters.items())
    return words | scores | ({"dft_alpha": objective.alpha} if "alpha" in vars(objective) else {})


@pytest.fixture(scope="module")
def train(example, forks):
    def run(name: str, ranks: int = 1, **flags):
        output = example.folder / f"objectives-{name}"
        codes, printed = forks.run(example.words(output, **{**FLAGS, **flags}), ranks)
        return output, codes, printed

    return run


@pytest.fixture(scope="module")
def prior(train) -> Path:
    """A model pretrained on the domain: p of an untrained model is too small for a threshold or p (1 - p)."""
    output, codes, printed = train("prior", objective="sft", max_train_samples=None, learning_rate=3e-3)
    assert codes == [0], printed
    return output


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[
                proves(flags_of(case.objective)),
                *[pytest.mark.slow] * (case.objective.title not in QUICK),
            ],
        )
        for case in CASES
    ],
    ids=lambda case: case.objective.title,
)
def test_training_lowers_the_objective(train, prior, case):
    flags = flags_of(case.objective)
    name = "-".join(map(str, flags.values())).replace("=", "")
    output, codes, printed = train(name, model_name_or_path=prior, learning_rate=3e-4, **flags)
    assert codes == [0], printed
    before, after = eval_records(output)
    assert re.search(rf"^method      {re.escape(case.objective.title)}", printed, re.MULTILINE)
    if case.potential is None:  # without a potential in p: compare the nll and the loss instead
        assert after["eval_nll"] < before["eval_nll"]
        # A weight that is a ratio to p of the base model grows while p does, and the loss with it.
        assert case.objective.needs_base_logp or after["eval_loss"] < before["eval_loss"]
        assert "eval_objective" not in after
    else:
        assert after["eval_objective"] < before["eval_objective"]
    assert after["eval_avg_p_correct"] > before["eval_avg_p_correct"]
    records = train_records(output)
    if case.objective.kl_weight:
        assert before["eval_kl"] < 1e-6 and 0 < after["eval_kl"] < 1
        assert "a frozen copy of the base model takes" in printed
    assert ("eval_kl" in after) == ("kl" in records[0]) == (case.objective.kl_weight > 0)
    assert ("dft_alpha" in records[0]) == ("alpha" in vars(case.objective))


@pytest.fixture(scope="module")
def whole(train, prior):
    """Reference runs in one process with full logits, by the name of their objective."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name], codes, printed = train(f"{name}-whole", **split(name, prior), fused_head="off")
            assert codes == [0], printed
        return folders[name]

    return make


def split(name: str, prior: Path) -> dict[str, object]:
    """Return the flags of runs that are split in different ways, with an end-of-turn floor."""
    return {
        "objective": name, "base_scores": OBJECTIVES[name].needs_base_logp, "model_name_or_path": prior,
        "end_of_turn_weight": 0.5, "max_train_samples": 37, "lr_scheduler_type": "constant",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name,
            form,
            marks=[
                proves({"objective": name, **FORMS[form]}, 2),
                *[pytest.mark.slow] * ((name, form) != ("asft", "zero3")),
            ],
        )
        for name in OBJECTIVES
        for form in FORMS
    ],
)
def test_two_ranks_take_the_same_steps_as_one(train, prior, whole, name, form):
    """Compare two ranks with micro-batches to one process."""
    reference = whole(name)
    two, codes, printed = train(
        f"{name}-{form}", 2, **split(name, prior), **FORMS[form],
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    assert codes == [0, 0], printed
    for mine, theirs in zip(
        train_records(reference) + eval_records(reference),
        train_records(two) + eval_records(two),
        strict=True,
    ):
        for key in set(mine) & {
            "loss",
            "objective",
            "kl",
            "grad_norm",
            "eval_loss",
            "eval_kl",
            "effective_tokens",
        }:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-7), key
    weights, others = (load_file(folder / "model.safetensors") for folder in (reference, two))
    if name in ("asft", "eaft", "power", "dft", "sft"):
        assert all(torch.allclose(weights[key], others[key], atol=2e-5) for key in weights)
    # Where a gradient is almost 0, Adam shows its rounding, which the norms of all weights average out.
    start = load_file(prior / "model.safetensors")
    moved = sum((weights[key] - start[key]).square().sum() for key in weights) ** 0.5
    differing = sum((weights[key] - others[key]).square().sum() for key in weights) ** 0.5
    assert differing < 1e-3 * moved


def test_the_alpha_schedule_continues_after_resuming(train):
    """Alpha rises to 0.8 over the first four of eight steps; the run is resumed after step 3."""
    how = {"dft_alpha": 0.8, "dft_alpha_schedule": "linear", "save_strategy": "steps", "save_steps": 3}
    output, codes, printed = train("rising", **how)
    assert codes == [0], printed
    assert "alpha 0.8 after a linear rise over 50 % of the steps" in printed
    rise = [0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]
    records = train_records(output)
    assert [record["dft_alpha"] for record in records] == pytest.approx(rise)
    assert records[0]["effective_tokens"] == pytest.approx(1) and records[0]["loss"] == records[0]["nll"]
    weights = load_file(output / "model.safetensors")
    again, codes, printed = train("rising-on", **how, resume_from_checkpoint=output / "checkpoint-3")
    assert codes == [0], printed
    resumed = load_file(again / "model.safetensors")
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_a_floor_raises_the_probability_of_end_of_turn_tokens(train):
    """An untrained model gives end-of-turn tokens a p near 0, and plain DFT hardly raises it."""
    probabilities = {}
    for floor in (0.0, 1.0):
        output, codes, printed = train(f"floor-{floor}", end_of_turn_weight=floor)
        assert codes == [0], printed
        probabilities[floor] = eval_records(output)[-1]["eval_p_end_of_turn"]
        assert ("end-of-turn tokens weigh at least 1" in printed) == (floor == 1)
    assert probabilities[1.0] > 10 * probabilities[0.0]


REFUSALS = {
    "unknown parameter": ({"objective": "power", "objective_args": "q=1"}, "power has no parameter 'q'"),
    "no number": ({"objective": "power", "objective_args": "k=much"}, "expected NAME=NUMBER"),
    "no name": ({"objective": "power", "objective_args": "0.5"}, "expected NAME=NUMBER"),
    "out of range": ({"objective": "threshold", "objective_args": "q=7"}, r"q must lie in \[0, 1\], got 7"),
    "not finite": ({"objective": "power", "objective_args": "k=nan"}, "k must lie in"),
    "alpha twice": ({"objective_args": "alpha=0.5"}, "alpha is set with --dft_alpha 0.5"),
    "no alpha": ({"objective": "chord", "dft_alpha": 0.5}, "the objective chord has no alpha"),
    "no alpha to rise": (
        {"objective": "sft", "dft_alpha_schedule": "linear"}, "--dft_alpha_schedule linear: the objective sft"
    ),
    "rising to nothing": ({"dft_alpha": 0, "dft_alpha_schedule": "cosine"}, "alpha increases from 0 to"),
    "share": ({"dft_alpha_schedule_share": 0}, "share 0: the share of an alpha schedule must be"),
    "floor": ({"end_of_turn_weight": 1.5}, r"--end_of_turn_weight 1.5: .* must lie in \[0, 1\]"),
    "plain and not": ({"use_simple_dft": False, "objective": "eaft"}, "--use_simple_dft False is SFT"),
    "unknown": ({"objective": "dtf"}, "invalid choice: 'dtf'"),
    "no scores": (
        {"objective": "psft"}, "--objective psft needs the probabilities of the model before training"
    ),
    "no measure": (
        {"objective": "eaft", "metric_for_best_model": "objective"}, "use eval_acc or eval_nll"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_contradictory_flags_are_rejected(train, name):
    flags, message = REFUSALS[name]
    _, codes, printed = train("refused", **flags)
    assert codes == [EXIT_USER_ERROR] and re.search(message, printed), printed
    assert "Traceback" not in printed
