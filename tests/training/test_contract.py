"""Private interfaces of libraries that DFTTrainer and the patches use; upgrades must fail here first."""

import importlib
import inspect
import logging
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from transformers import core_model_loading

import dft.training.trainer
from dft import DFTTrainer
from dft.training.measuring import device_skip
from dft.training.patches import (
    ARGUMENT_MISMATCH,
    PATCHES,
    hidden_argument_mismatch,
    set_step_skipped,
    set_update_skipped,
)

TENSOR = "torch.Tensor"
MODULE = "torch.nn.modules.module.Module"
DATASET = "torch.utils.data.dataset.Dataset"
TRIAL = "'optuna.Trial | dict[str, Any] | None'"
INPUTS = f"dict[str, {TENSOR} | typing.Any]"
OVERRIDDEN = {
    "_determine_best_metric": f"(self, metrics: dict[str, float], trial: {TRIAL}) -> bool",
    "_get_dataloader": (
        f"(self, dataset: {DATASET}, description: str, batch_size: int, sampler_fn: collections.abc.Callable["
        f"[{DATASET}], torch.utils.data.sampler.Sampler] | None = None, is_training: bool = False, "
        "dataloader_key: str | None = None) -> torch.utils.data.dataloader.DataLoader"
    ),
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_learning_rate": "(self) -> float",
    "_load_best_model": "(self) -> None",
    "_load_from_checkpoint": f"(self, resume_from_checkpoint: str, model: {MODULE} | None = None) -> None",
    "_load_optimizer_and_scheduler": "(self, checkpoint: str | None) -> None",
    "_prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "_run_epoch": (
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
        "steps_trained_in_current_epoch)"
    ),
    "_save": "(self, output_dir: str | None = None, state_dict: dict | None = None) -> None",
    "_save_checkpoint": f"(self, model: {MODULE}, trial: {TRIAL}) -> None",
}
"""The private methods of transformers.Trainer that DFTTrainer overrides, with their signatures."""

CALLED = {
    "_get_output_dir": f"(self, trial: {TRIAL}) -> str",
    "_load_rng_state": "(self, checkpoint: str | None) -> None",
    "_maybe_log_save_evaluate": (
        f"(self, tr_loss: {TENSOR}, grad_norm: {TENSOR} | float | None, model: {MODULE}, trial: {TRIAL}, "
        "epoch: float, ignore_keys_for_eval: list[str] | None, start_time: float, learning_rate: float | "
        "None = None) -> None"
    ),
    "_prepare_inputs": f"(self, inputs: {INPUTS}) -> {INPUTS}",
    "_save_optimizer_and_scheduler": "(self, output_dir: str) -> None",
    "_save_rng_state": "(self, output_dir: str) -> None",
    "_save_scaler": "(self, output_dir: str) -> None",
}
"""The private methods of transformers.Trainer that DFTTrainer calls, with their signatures."""

ATTRIBUTES = {"_globalstep_last_logged", "_loss_shifts_labels", "_total_loss_scalar", "_tr_loss"}
"""The private attributes of transformers.Trainer that DFTTrainer reads or sets."""

TRAINER_SOURCE = inspect.getsource(transformers.Trainer)
OWN_SOURCE = inspect.getsource(dft.training.trainer)


def private_methods() -> set[str]:
    names = {name for name in vars(DFTTrainer) if name.startswith("_") and not name.startswith("__")}
    return {name for name in names if callable(vars(DFTTrainer)[name])}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_private_method_of_trainer_has_the_expected_signature(name):
    method = vars(transformers.Trainer).get(name)
    assert method is not None, f"transformers.Trainer.{name} no longer exists; adapt DFTTrainer"
    signature, expected = str(inspect.signature(method)), {**OVERRIDDEN, **CALLED}[name]
    assert signature == expected, f"transformers.Trainer.{name} is now {signature}; adapt DFTTrainer"


def test_only_listed_private_methods_are_overridden():
    overridden = private_methods() & vars(transformers.Trainer).keys()
    changed = overridden ^ OVERRIDDEN.keys()
    assert not changed, f"{sorted(changed)}: list exactly the private methods that DFTTrainer overrides"


def test_each_private_override_states_why_there_is_no_public_way():
    for name in OVERRIDDEN:
        assert "# Private: " in inspect.getsource(vars(DFTTrainer)[name]), name


def test_only_listed_private_names_of_trainer_are_used():
    used = set(re.findall(r"(?:self|super\(\))\.(_[a-z]\w*)", OWN_SOURCE)) - private_methods()
    trainer_names = set(re.findall(r"self\.(_[a-z]\w*)", TRAINER_SOURCE))
    unlisted = (used & trainer_names) - CALLED.keys() - ATTRIBUTES
    assert not unlisted, f"{sorted(unlisted)}: list the private names of Trainer, or use other names"
    for name in ATTRIBUTES:
        assert name in trainer_names, f"transformers.Trainer.{name} no longer exists; adapt DFTTrainer"


def test_own_private_methods_do_not_collide_with_those_of_trainer():
    own = private_methods() - OVERRIDDEN.keys()
    collisions = own & set(re.findall(r"self\.(_[a-z]\w*)", TRAINER_SOURCE))
    assert not collisions, f"{sorted(collisions)}: transformers.Trainer uses these names; rename them"


def test_overrides_are_short():
    for name, method in vars(DFTTrainer).items():
        if name == "__init__" or not inspect.isfunction(method) or name not in dir(transformers.Trainer):
            continue
        lines = inspect.getsource(method).split(":\n", 1)[1].splitlines()
        body = re.sub(r'"""(.|\n)*?"""', "", "\n".join(lines)).splitlines()
        code = [line for line in body if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= 10, f"{name} has {len(code)} lines: hand the work to a component"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.where)
def test_patches_exist_and_are_for_the_installed_version(patch):
    module, name = patch.where.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))
    installed = version(patch.package)
    assert installed.startswith(f"{patch.version}."), (
        f"{patch.where} was written for {patch.package} {patch.version}, and {installed} is installed: check "
        "whether it still changes the right thing, then update its version"
    )


def test_accelerate_reports_a_step_as_skipped_by_the_patched_attribute():
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert "_is_overflow" in vars(optimizer) and not optimizer.step_was_skipped
    set_step_skipped(optimizer, True)
    assert optimizer.step_was_skipped, "accelerate no longer reads AcceleratedOptimizer._is_overflow"
    assert "step_was_skipped" in inspect.getsource(Accelerator.optimizer_step_was_skipped.fget)


@pytest.mark.parametrize("kind", device_skip.OPTIMIZERS)
def test_fused_adam_skips_updates_by_the_patched_attribute(kind):
    """Neither weight decay nor moments nor step counters change, also in the first step."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([weight], lr=0.1, weight_decay=0.1, fused=True)
    for step, gradient in enumerate((torch.nan, 1.0, torch.nan, 1.0)):
        weight.grad = torch.full((2,), gradient)
        before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
        set_update_skipped(optimizer, torch.tensor(float(gradient != 1)))
        optimizer.step()
        after = [weight.detach(), *optimizer.state[weight].values()]
        changes = [not torch.equal(*pair) for pair in zip(before, after, strict=step > 0)]
        assert changes and set(changes) == {gradient == 1}
    assert optimizer.state[weight]["step"].item() == 2
    set_update_skipped(optimizer, None)
    assert vars(optimizer).keys() == vars(kind([weight], fused=True)).keys()


def test_transformers_reverts_the_patched_conversions_when_it_saves():
    source = inspect.getsource(core_model_loading.revert_weight_conversion)
    assert "_weight_conversions" in source, "conversions are recorded elsewhere: adapt keep_source_names"
    conversion = core_model_loading.PrefixChange(prefix_to_add="model")
    assert not conversion.was_used()
    assert conversion.rename_source_key("norm.weight")[0] == "model.norm.weight" and conversion.was_used()
    assert conversion.reverse_transform().rename_source_key("model.norm.weight")[0] == "norm.weight"


def test_transformers_warns_about_other_arguments_in_the_hidden_words():
    logger = logging.getLogger("transformers.trainer_utils")
    source = inspect.getsource(transformers.trainer_utils.compare_trainer_and_checkpoint_args)
    assert ARGUMENT_MISMATCH in source, "the warning has changed: adapt ARGUMENT_MISMATCH"
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, f"{ARGUMENT_MISMATCH}: ...", (), None)
    other = logger.makeRecord(logger.name, logging.WARNING, "", 0, "another warning", (), None)
    with hidden_argument_mismatch():
        assert not logger.filter(record) and logger.filter(other)
    assert logger.filter(record)


def test_accelerate_keeps_the_patched_type_of_parallelism():
    assert "distributed_type" in vars(PartialState()), "PartialState.distributed_type no longer exists"


def test_accelerate_unwraps_a_model_without_importing_deepspeed():
    code = """
import sys
from accelerate import Accelerator
from torch import nn
from dft.training.patches import skip_deepspeed_import

accelerator = Accelerator(cpu=True)
skip_deepspeed_import()
accelerator.unwrap_model(nn.Linear(1, 1))
print("deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", "accelerate no longer asks the patched function"


def test_deepspeed_keeps_its_compatible_operators_in_the_patched_table():
    deepspeed = pytest.importorskip("deepspeed")
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, "the table of operators has changed"


def test_deepspeed_still_loads_universal_checkpoints_as_the_patch_expects():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    source = inspect.getsource(
        DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3
    )
    assert "optimizer_state.pt" in source and "'step'" in source.replace('"', "'"), (
        "DeepSpeed loads universal checkpoints in another way: check fix_zero3_universal_load"
    )
