"""Flags of a resumed run that its checkpoint also holds take effect with a message, or are refused.

The expected run is uninterrupted: a callback sets the optimizer's options and learning rate before each step.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback

from dft import DFTTrainer
from dft.data.batches.dataset import SCHEMA, WEIGHTED_SCHEMA, Sequences
from dft.errors import UserError
from dft.training.checkpoints.data_digest import data_digest
from dft.training.checkpoints.folder import MANIFEST
from dft.training.checkpoints.run_settings import (
    BASE,
    DEEPSPEED_PRECISION,
    LORA_ALPHA,
    LORA_DROPOUT,
    METRIC,
    OPTIMIZER,
    TRAINING_SETTINGS,
    WEIGHTS,
    change_lines,
    changes_best,
    changes_record,
    check_settings,
    training_settings,
)
from dft.training.checkpoints.run_settings import CHANGES as CHANGED_FLAGS
from dft.training.checkpoints.run_state import RunFacts, recorded_settings
from tests.launching import ROOT
from tests.training.test_trainer import conversations, tiny

SAVED = 3
"""The step of the checkpoint: half an epoch."""
ROWS = conversations(24)
PEAK = 1e-2


def linear(peak: float = PEAK, warmup: int = 2, total: int = 6) -> Callable[[int], float]:
    """Return the learning rate of a step, counted from 0, of the linear schedule."""
    return lambda step: peak * (step / warmup if step < warmup else (total - step) / (total - warmup))


@dataclass
class Change:
    """Flags that a resumed run changes, and what they must do.

    Attributes:
        flags: the flags of the resumed run that differ.
        line: the end of the message.
        rate: the learning rate of each step from the checkpoint on.
        options: options of the optimizer's parameter groups from there on.
        before: flags of the run that saves the checkpoint, if they are not `FLAGS`.
    """

    flags: dict[str, Any]
    line: str
    rate: Callable[[int], float] = field(default_factory=linear)
    options: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)


FLAGS: dict[str, Any] = {
    "learning_rate": PEAK, "weight_decay": 0.1, "warmup_steps": 2, "max_steps": 6,
    "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
}  # fmt: skip
MIN_LR = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 1.0}}
CHANGES = {
    "--learning_rate": Change({"learning_rate": 1e-3}, "from 0.01 to 0.001", linear(1e-3)),
    "--weight_decay": Change({"weight_decay": 0.9}, "from 0.1 to 0.9", options={"weight_decay": 0.9}),
    "--adam_beta1": Change({"adam_beta1": 0.5}, "from 0.9 to 0.5", options={"betas": (0.5, 0.999)}),
    "--adam_beta2": Change({"adam_beta2": 0.9}, "from 0.999 to 0.9", options={"betas": (0.9, 0.9)}),
    "--adam_epsilon": Change({"adam_epsilon": 1e-2}, "from 1e-08 to 0.01", options={"eps": 1e-2}),
    "--lr_scheduler_type": Change(
        {"lr_scheduler_type": "constant"}, "from linear to constant", lambda step: PEAK
    ),
    "--lr_scheduler_kwargs": Change(
        MIN_LR,
        'from {"min_lr_rate": 0.5} to {"min_lr_rate": 1.0}',
        lambda step: PEAK,
        before={**MIN_LR, "lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
    ),
    "--warmup_steps": Change({"warmup_steps": 4}, "from 2 to 4", linear(warmup=4)),
    "--max_steps": Change({"max_steps": 12}, "from 6 to 12", linear(total=12)),
    "--num_train_epochs": Change(
        {"max_steps": -1, "num_train_epochs": 2, "warmup_steps": 0},
        "from 0.5 to 2",
        linear(warmup=0, total=12),
        before={"max_steps": -1, "num_train_epochs": 0.5, "warmup_steps": 0},
    ),
}
"""Settings that take effect in the optimizer or the schedule, with the learning rates that must follow."""


class Forced(TrainerCallback):
    """Sets the learning rate of each step and, from the step of the checkpoint on, the options."""

    def __init__(self, rates: list[float], options: dict[str, Any]) -> None:
        self.rates, self.options = rates, options

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = self.rates[state.global_step]
            for name, value in self.options.items():
                if state.global_step >= SAVED and group[name]:  # one group has no weight decay
                    group[name] = value


def trainer(folder: Path, flags: dict[str, Any], **options: Any) -> DFTTrainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, seed=5, logging_steps=1,
        save_steps=SAVED, **{**FLAGS, **flags},
    )  # fmt: skip
    model = options.pop("model", None) or tiny()
    return DFTTrainer(model, arguments, alpha=0.6, train_dataset=Dataset.from_list(ROWS), **options)


def arguments_of(folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir=str(folder), use_cpu=True)


def weights(run: DFTTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def rates(run: DFTTrainer) -> list[float]:
    return [record["learning_rate"] for record in run.state.log_history if "grad_norm" in record]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the checkpoint of a run with some flags. Runs with the same flags share it."""
    folders: dict[str, Path] = {}

    def make(**flags: Any) -> str:
        key = json.dumps(flags)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("saved")
            trainer(folders[key], flags).train()
        return str(folders[key] / f"checkpoint-{SAVED}")

    return make


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_flag_takes_effect_from_the_step_of_the_checkpoint_on(name, saved, tmp_path, capsys):
    change = CHANGES[name]
    checkpoint = saved(**change.before)
    capsys.readouterr()
    resumed = trainer(tmp_path / "resumed", {**change.before, **change.flags})
    resumed.train(resume_from_checkpoint=checkpoint)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert lines == [f"note        {name}: {change.line}, from step {SAVED + 1} on"]

    first = trainer(tmp_path / "first", change.before)
    first.train()
    steps = resumed.state.max_steps
    forced = [*rates(first)[:SAVED], *(change.rate(step) for step in range(SAVED, steps))]
    callback = Forced(forced, change.options)
    expected = trainer(tmp_path / "expected", change.before | {"max_steps": steps}, callbacks=[callback])
    expected.train()
    assert rates(resumed) == pytest.approx(forced)
    torch.testing.assert_close(weights(resumed), weights(expected), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(weights(resumed), weights(first), rtol=1e-3, atol=1e-5)


def test_without_a_change_nothing_is_reported_and_the_run_is_exact(saved, tmp_path, capsys):
    checkpoint = saved()
    whole = trainer(tmp_path / "whole", {})
    whole.train()
    capsys.readouterr()
    resumed = trainer(tmp_path / "resumed", {})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert "note " not in capsys.readouterr().out
    assert torch.equal(weights(resumed), weights(whole)) and rates(resumed) == rates(whole)


@pytest.mark.parametrize(
    "schedule", ["cosine_with_restarts", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"]
)
def test_every_schedule_continues_exactly_and_a_flag_beside_it_takes_effect(schedule, tmp_path, capsys):
    """The adaptive schedules keep the learning rate that they have reached."""
    flags = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1}
    flags |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    if schedule == "reduce_lr_on_plateau":
        flags["lr_scheduler_kwargs"] = {"patience": 0, "threshold": 1.0}  # reduces at every evaluation
    data = {"eval_dataset": Dataset.from_list(ROWS)}
    whole = trainer(tmp_path / "whole", flags, **data)
    whole.train()
    checkpoint = str(tmp_path / f"whole/checkpoint-{SAVED}")
    resumed = trainer(tmp_path / "resumed", flags, **data)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(weights(resumed), weights(whole)) and rates(resumed) == rates(whole)
    resumed = trainer(tmp_path / "changed", flags | {"weight_decay": 0.9}, **data)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.9
    assert not torch.equal(weights(resumed), weights(whole))
    if schedule == "reduce_lr_on_plateau":
        assert rates(resumed) == rates(whole) and rates(whole)[-1] < PEAK / 100


def test_another_split_of_the_batch_is_reported_and_gives_the_same_weights(saved, tmp_path, capsys):
    whole = trainer(tmp_path / "whole", {})
    whole.train()
    capsys.readouterr()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = trainer(tmp_path / "resumed", split)
    resumed.train(resume_from_checkpoint=saved())
    printed = capsys.readouterr().out
    assert "--per_device_train_batch_size: from 4 to 2, from step 4 on" in printed
    assert "--gradient_accumulation_steps: from 1 to 2, from step 4 on" in printed
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "now", "is_fused"),
    [("adamw_torch", "adamw_torch_fused", True), ("adamw_torch_fused", "adamw_torch", None)],
)
def test_another_implementation_of_adamw_continues_the_state(saved, tmp_path, capsys, before, now, is_fused):
    whole = trainer(tmp_path / "whole", {"optim": before})
    whole.train()
    capsys.readouterr()
    resumed = trainer(tmp_path / "resumed", {"optim": now})
    resumed.train(resume_from_checkpoint=saved(optim=before))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert lines == [f"note        --optim: from {before} to {now}, from step 4 on"]
    assert {group["fused"] for group in resumed.optimizer.param_groups} == {is_fused}
    assert {state["step"].item() for state in resumed.optimizer.state.values()} == {6}
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-6, atol=1e-8)


def test_deepspeed_does_not_change_the_implementation_of_adamw(tmp_path):
    before = {OPTIMIZER: "adamw_torch", DEEPSPEED_PRECISION: "bf16"}
    with pytest.raises(
        UserError, match="and this run has --optim adamw_torch_fused: the state of the optimizer"
    ):
        check_settings(tmp_path, before, before | {OPTIMIZER: "adamw_torch_fused"})


def test_data_that_are_trained_again_are_reported(saved, tmp_path, capsys):
    """--ignore_data_skip starts the data order of the interrupted epoch from its beginning."""
    resumed = trainer(tmp_path, {"ignore_data_skip": True})
    resumed.train(resume_from_checkpoint=saved())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert lines == [
        "note        --ignore_data_skip True: the data order of the epoch starts from its beginning, so "
        "sequences that this epoch has trained before step 4 are trained again"
    ]


def test_another_gradient_limit_takes_effect(saved, tmp_path, capsys):
    """SGD makes an update as long as the learning rate times the clipped norm of the gradient."""
    sgd = {"optim": "sgd", "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    checkpoint = saved(**sgd)
    resumed = trainer(tmp_path, {**sgd, "max_grad_norm": 1e-3, "max_steps": SAVED + 1})
    before = torch.cat(
        [parameter.flatten() for parameter in type(tiny()).from_pretrained(checkpoint).parameters()]
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    assert "--max_grad_norm: from 0 to 0.001" in capsys.readouterr().out
    assert (weights(resumed) - before).norm().item() == pytest.approx(PEAK * 1e-3, rel=1e-2)


def test_another_precision_takes_effect(saved, tmp_path, capsys):
    resumed = trainer(tmp_path / "autocast", {"bf16": True})
    resumed.train(resume_from_checkpoint=saved())
    assert "mixed precision (--bf16, --fp16): from no to bf16" in capsys.readouterr().out
    assert resumed.accelerator.mixed_precision == "bf16"
    resumed = trainer(tmp_path / "weights", {}, model=tiny().to(torch.bfloat16))
    resumed.train(resume_from_checkpoint=saved())
    assert f"{WEIGHTS}: from float32 to bfloat16" in capsys.readouterr().out
    assert {parameter.dtype for parameter in resumed.model.parameters()} == {torch.bfloat16}
    assert resumed.state.global_step == 6 and weights(resumed).isfinite().all()


def test_noise_on_the_embeddings_takes_effect(saved, tmp_path, capsys):
    whole = trainer(tmp_path / "whole", {})
    whole.train()
    resumed = trainer(tmp_path / "resumed", {"neftune_noise_alpha": 5.0})
    resumed.train(resume_from_checkpoint=saved())
    assert "--neftune_noise_alpha: from none to 5, from step 4 on" in capsys.readouterr().out
    assert not torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"metric_for_best_model": "eval_nll"}, "--metric_for_best_model: from eval_acc to eval_nll"),
        ({"greater_is_better": False}, "--greater_is_better: from true to false"),
    ],
)
def test_the_best_checkpoint_is_chosen_anew_by_another_metric(tmp_path, capsys, flags, line):
    """A large accuracy would otherwise remain the best value of the other metric forever."""
    evaluating = {"eval_strategy": "steps", "eval_steps": SAVED, "greater_is_better": True}
    data = {"eval_dataset": Dataset.from_list(ROWS)}
    before = trainer(tmp_path, {**evaluating, "metric_for_best_model": "eval_acc"}, **data)
    before.train()
    flags = {**evaluating, "metric_for_best_model": "eval_acc", **flags}
    resumed = trainer(tmp_path, flags, **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert f"{line}, from step 4 on" in capsys.readouterr().out
    last = [record for record in resumed.state.log_history if "eval_nll" in record][-1]
    assert resumed.state.best_metric == last[flags["metric_for_best_model"]]
    assert resumed.state.best_global_step == 6


def test_the_best_checkpoint_is_chosen_anew_on_other_evaluation_data(tmp_path, capsys):
    """Metrics of other data cannot be compared, and the best value of the easier data would remain."""
    evaluating = {"eval_strategy": "steps", "eval_steps": SAVED, "metric_for_best_model": "eval_nll"}
    flags = {**evaluating, "greater_is_better": False}
    trainer(tmp_path, flags, eval_dataset=Dataset.from_list(ROWS[:4])).train()
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    state_file = checkpoint / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["best_metric"] = 1e-6  # a value that the other data never reach
    state_file.write_text(json.dumps(state).ljust(state_file.stat().st_size))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["trainer_state.json"] = state_file.stat().st_size
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    capsys.readouterr()

    for evaluation, is_new in ((ROWS[4:8], True), (ROWS[:4], False)):
        resumed = trainer(tmp_path, flags, eval_dataset=Dataset.from_list(evaluation))
        resumed.train(resume_from_checkpoint=str(checkpoint))
        notes = [line for line in capsys.readouterr().out.splitlines() if "evaluation data: from " in line]
        assert len(notes) == is_new
        assert all(line.endswith("on; the best checkpoint is chosen from here on") for line in notes)
        assert (resumed.state.best_metric == 1e-6) != is_new
        checkpoint = tmp_path / f"checkpoint-{SAVED}"
    assert resumed.state.best_global_step == SAVED


def test_the_best_loss_of_another_objective_is_not_compared(tmp_path, capsys):
    facts = {name: RunFacts(arguments_of(tmp_path), ROWS, method=name) for name in ("DFT", "SFT")}
    for metric, is_new in (("eval_loss", True), ("objective", True), ("eval_nll", False)):
        for run in facts.values():
            run.settings = {METRIC: metric}
        manifest = facts["DFT"].manifest(3, True)
        assert changes_best(recorded_settings(manifest), facts["SFT"].recorded) == is_new
        (line,) = facts["SFT"].differences(manifest)
        assert line.endswith("the best checkpoint is chosen from here on") == is_new
        assert not changes_best(recorded_settings(manifest), facts["DFT"].recorded)


def changed(column: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{**ROWS[0], column: values}, *ROWS[1:]]


LENGTH = len(ROWS[0]["input_ids"])
OTHER_DATA = {
    "other tokens": changed("input_ids", [1] * LENGTH),
    "other supervision": changed("labels", [-100] * (LENGTH - 1) + [1]),
    "weights": [{**row, "loss_weights": [0.5] * len(row["input_ids"])} for row in ROWS],
}


@pytest.mark.parametrize("kind", ["list", "arrow"])
@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_of_the_same_lengths_are_reported(name, kind, tmp_path):
    """Flags such as --train_on_last_turn_only change only which tokens are supervised."""
    make = Dataset.from_list if kind == "arrow" else list
    before = RunFacts(arguments_of(tmp_path), make(ROWS))
    manifest = before.manifest(3, True)
    assert RunFacts(arguments_of(tmp_path), make(ROWS)).differences(manifest) == []
    now = RunFacts(arguments_of(tmp_path), make(OTHER_DATA[name]))
    (line,) = now.differences(manifest)
    assert line.startswith("warning     the training data differ from those of the checkpoint in tokens, ")
    (change,) = changes_record(recorded_settings(manifest), now.recorded, 3)[CHANGED_FLAGS].items()
    assert change[0] == "training data" and change[1][0] != change[1][1]
    del manifest["order"]["content"]  # as in checkpoints of earlier versions
    assert now.differences(manifest) == []


def test_prepared_data_of_the_same_lengths_have_another_digest(tmp_path):
    """The digest of the files that the command line prepares, with and without weights of tokens."""

    def prepared(labels: list[int], weights: list[float] | None, order: list[int]) -> str | None:
        schema = SCHEMA if weights is None else WEIGHTED_SCHEMA
        columns = {
            "input_ids": [[1, 2, 3], [4, 5]], "labels": [labels, [-100, 5]], "source": [0, 0],
            "line": [1, 2], "part": [0, 0], "reason": ["", ""],
        }  # fmt: skip
        if weights is not None:
            columns["loss_weights"] = [weights, None]
        with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
            out.write_table(pa.table(columns, schema=schema))
        return data_digest(Sequences(tmp_path / "data.arrow", np.array(order)))

    same = prepared([-100, 2, 3], None, [0, 1])
    assert same == prepared([-100, 2, 3], None, [0, 1])
    others = [
        prepared([-100, -100, 3], None, [0, 1]),
        prepared([-100, 2, 3], None, [1, 0]),
        prepared([-100, 2, 3], [0.5, 0.5, 0.5], [0, 1]),
        prepared([-100, 2, 3], [0.5, 0.5, 1.0], [0, 1]),
    ]
    assert len({same, *others}) == 5


REFUSED = {
    "--optim": ({"optim": "sgd"}, "--optim adamw_torch_fused, and this run has --optim sgd"),
    "--optim_args": (
        {"optim_args": "amsgrad=True"},
        "no --optim_args, and this run has --optim_args amsgrad",
    ),
    "--optim_target_modules": (
        {"optim_target_modules": ["q_proj"]},
        'no --optim_target_modules, and this run has --optim_target_modules ["q_proj"]',
    ),
    "--lr_scheduler_type": (
        {"lr_scheduler_type": "greedy"},
        "--lr_scheduler_type linear, and this run has --lr_scheduler_type greedy: the learning rate of "
        "greedy follows from the evaluations so far",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_would_not_fit_the_state_is_refused(name, saved, tmp_path):
    flags, message = REFUSED[name]
    checkpoint = saved()
    run = trainer(tmp_path, {})
    for flag, value in flags.items():  # after creation, because some of these optimizers need a package
        setattr(run.args, flag, value)
    run.args.optim = transformers.training_args.OptimizerNames(run.args.optim)
    run.args.lr_scheduler_type = transformers.SchedulerType(run.args.lr_scheduler_type)
    with pytest.raises(UserError) as error:
        run.train(resume_from_checkpoint=checkpoint)
    assert message in str(error.value)
    assert str(error.value).endswith(
        f"; use the former, or start a new run with --model_name_or_path {checkpoint}"
    )


@pytest.mark.parametrize("flag", ["--learning_rate", "--lr_scheduler_kwargs"])
def test_an_adaptive_schedule_keeps_its_learning_rate(flag, tmp_path):
    settings = {"--lr_scheduler_type": "reduce_lr_on_plateau", flag: 1}
    with pytest.raises(UserError, match=f"{flag} 1, and this run has {flag} 2: the learning rate of reduce_"):
        check_settings(tmp_path, settings, {**settings, flag: 2})
    check_settings(tmp_path, settings, settings | {"--weight_decay": 2})


def test_adapters_are_not_scaled_differently(tmp_path):
    with pytest.raises(UserError, match="--lora_alpha 8, and this run has --lora_alpha 16: the adapters"):
        check_settings(tmp_path, {LORA_ALPHA: 8}, {LORA_ALPHA: 16})
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(
        UserError, match=r"merge its adapters \(python scripts/merge_lora.py .* NEW\) and start"
    ):
        check_settings(tmp_path, {LORA_ALPHA: 8}, {LORA_ALPHA: 16})
    lines = change_lines({LORA_ALPHA: 8, LORA_DROPOUT: 0.1}, {LORA_ALPHA: 8, LORA_DROPOUT: 0.5}, 3)
    assert lines == [f"note        {LORA_DROPOUT}: from 0.1 to 0.5, from step 4 on"]


def test_another_model_with_the_same_shapes_is_reported():
    lines = change_lines({BASE: "a"}, {BASE: "b"}, 3)
    assert lines == [
        f"note        {BASE}: from a to b, from step 4 on, which has no effect: the weights are those of the "
        "checkpoint"
    ]
    (line,) = change_lines({BASE: "a", LORA_ALPHA: 8}, {BASE: "b", LORA_ALPHA: 8}, 3)
    assert line.endswith(": the adapters of the checkpoint continue on other frozen weights")


def test_settings_of_the_deepspeed_file_are_compared_without_those_that_flags_determine(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.deepspeed = "z3.json"

    def settings(optimizer: dict[str, Any], scheduler: str) -> dict[str, Any]:
        config = {"optimizer": {"type": "AdamW", "params": optimizer}, "scheduler": {"type": scheduler}}
        arguments.hf_deepspeed_config = SimpleNamespace(config=config)
        return training_settings(arguments)

    before = settings({"lr": 1, "torch_adam": True}, "WarmupLR")
    check_settings(tmp_path, before, settings({"lr": 2, "torch_adam": True}, "WarmupLR"))
    with pytest.raises(UserError, match='\'optimizer\' in the DeepSpeed file {"type": "AdamW", "torch_adam"'):
        check_settings(tmp_path, before, settings({"lr": 1}, "WarmupLR"))
    with pytest.raises(UserError, match="'scheduler' in the DeepSpeed file WarmupDecayLR"):
        check_settings(tmp_path, before, settings({"lr": 1, "torch_adam": True}, "WarmupDecayLR"))


def test_flags_apply_to_checkpoints_of_earlier_versions(saved, tmp_path, capsys):
    checkpoint = Path(saved(weight_decay=0.2))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["settings"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    resumed = trainer(tmp_path, {"learning_rate": 1e-3})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "did not record its flags: those of this run apply from step 4 on" in capsys.readouterr().out
    assert rates(resumed)[SAVED:] == pytest.approx([linear(1e-3)(step) for step in range(SAVED, 6)])
    groups = resumed.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_an_optimizer_of_the_caller_keeps_the_settings_of_its_checkpoint(tmp_path, capsys):
    def own(rate: float) -> DFTTrainer:
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return trainer(tmp_path, {}, model=model, optimizers=(optimizer, schedule))

    own(1e-2).train()
    capsys.readouterr()
    resumed = own(1.0)
    resumed.args.learning_rate = 5.0  # not used by this run
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert "--learning_rate" not in capsys.readouterr().out
    assert rates(resumed)[SAVED:] == pytest.approx([1e-3, 1e-4, 1e-4])


def test_the_documentation_lists_every_setting():
    page = (ROOT / "docs/interruptions.md").read_text()
    names = [setting.name for setting in TRAINING_SETTINGS] + [LORA_ALPHA, LORA_DROPOUT, WEIGHTS, BASE]
    table = [line for line in page.splitlines() if line.startswith("| ")]
    for name in names:
        flags = [word.strip("(),") for word in name.split() if "--" in word or "'" in word]
        assert any(all(flag in line for flag in flags) for line in table), name
