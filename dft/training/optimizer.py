"""Check the optimizer and the learning-rate schedule, and their arguments, before the model is loaded."""

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path

import torch
import transformers
from torch.utils import cpp_extension
from transformers.training_args import OptimizerNames

from dft.arguments.deepspeed_file import deepspeed_flag, zero_of
from dft.arguments.training import TrainingArguments, needs_whole_matrices, optimizer_name
from dft.errors import UserError
from dft.training.muon import MuonWithAdamW, muon_optimizer
from dft.training.trainer import DFTTrainer

UNSUPPORTED_OPTIMIZERS = (
    OptimizerNames.LOMO, OptimizerNames.ADALOMO, OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE, OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
)  # fmt: skip
"""Optimizers that update weights before the gradient norm of the step is known."""
OPERATORS = {"adam": "FusedAdam", "adamw": "FusedAdam", "lion": "FusedLion", "lamb": "FusedLamb"}
"""Compiled operators of the optimizers of a DeepSpeed file that run on the device of the model."""
OFFLOADED_OPERATORS = {"adam": "CPUAdam", "adamw": "CPUAdam", "adagrad": "CPUAdagrad", "lion": "CPULion"}
"""The same for optimizers that are offloaded to the CPU; the others have no version of their own there."""
OFFLOADED_OPTIM = {
    OptimizerNames.ADAMW_TORCH: "CPUAdam", OptimizerNames.ADAMW_TORCH_FUSED: "CPUAdam",
    OptimizerNames.PAGED_ADAMW: "CPUAdam", OptimizerNames.ADAGRAD: "CPUAdagrad",
    OptimizerNames.LION: "CPULion", OptimizerNames.PAGED_LION: "CPULion",
}  # fmt: skip
"""Operators with which accelerate replaces --optim if a DeepSpeed file without optimizer offloads it."""
DEVICES = {"_xla": "xla", "_npu": "npu"}
"""Types of devices by a part of the name of the optimizer that is made for them."""
PACKAGES = {
    "galore": ("galore_torch", "galore-torch"), "apollo": ("apollo_torch", "apollo-torch"),
    "grokadamw": ("grokadamw", "grokadamw"), "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"), "torch_4bit": ("torchao", "torchao"),
    "torch_8bit": ("torchao", "torchao"), "anyprecision": ("torchdistx", "torchdistx"),
    "bnb": ("bitsandbytes", "bitsandbytes"), "adamw_8bit": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"), "lion": ("bitsandbytes", "bitsandbytes"),
    "paged": ("bitsandbytes", "bitsandbytes"),
}  # fmt: skip
"""Module and package that an optimizer needs, by a part of its name."""
NEED_MUP = ("muadam", "muadamw", "musgd")
NOT_IMPLEMENTED = "deepspeed_not_implemented"
"""Name that DeepSpeed gives to an operator that a device lacks."""


def check_optimizer(training: TrainingArguments) -> None:
    """Raise `UserError` if the optimizer or the learning-rate schedule does not accept its arguments.

    Both are created for a dummy parameter. With --optim_target_modules, only the package is checked.
    """
    flag = f"--optim {optimizer_name(training)}"
    if training.optim in UNSUPPORTED_OPTIMIZERS:
        raise UserError(
            f"{flag}: updates the weights during the backward pass, before the gradient is known to be "
            "finite; choose another, such as adafactor or adamw_8bit, which need little memory as well"
        )
    check_package(training)
    check_whole_matrices(training)
    if training.optim_target_modules:
        try:
            DFTTrainer.get_optimizer_cls_and_kwargs(training, torch.nn.Linear(1, 1))
        except ImportError as error:
            raise UserError(f"{flag}: {' '.join(str(error).split())}") from None
        except ValueError:
            pass  # the layer has no such modules
        return
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    muon = muon_optimizer(training)
    try:
        if muon is not None:
            optimizer: torch.optim.Optimizer = MuonWithAdamW([parameter], [], [], **muon[1])
        else:
            optimizer_class, options = DFTTrainer.get_optimizer_cls_and_kwargs(training)
            optimizer = optimizer_class([parameter], **options)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{flag}: {' '.join(str(error).split())}") from None
    try:
        transformers.get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=100,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs "
            f"{json.dumps(training.lr_scheduler_kwargs)}: {' '.join(str(error).split())}"
        ) from None


def check_package(training: TrainingArguments) -> None:
    """Raise `UserError` if the package or the device of an optimizer is missing."""
    name = optimizer_name(training)
    flag = f"--optim {name}"
    for kind, device in DEVICES.items():
        if kind in name and training.device.type != device:
            raise UserError(
                f"{flag}: needs a device of the type {device}, and this run is on "
                f"{training.device.type}; use adamw_torch"
            )
    for kind, (module, package) in PACKAGES.items():
        if kind in name and importlib.util.find_spec(module) is None:
            raise UserError(f"{flag}: needs the package {package}, which is missing; pip install {package}")


def check_whole_matrices(training: TrainingArguments) -> None:
    """Raise `UserError` if the optimizer computes with whole matrices and the run gives it parts of them."""
    if not needs_whole_matrices(training):
        return
    if training.deepspeed:
        flag, parts = deepspeed_flag(training.deepspeed), "flat parts of them"
    elif training.fsdp:
        flag, parts = "--fsdp", "the shards of each rank"
    else:
        return
    raise UserError(
        f"--optim {optimizer_name(training)}: computes with rows and columns of whole weight matrices, and "
        f"{flag} gives the optimizer {parts}; use adamw_torch, or remove {flag} (several ranks without it "
        "are DDP)"
    )


def check_operators(training: TrainingArguments) -> None:
    """Raise `UserError` if an optimizer of DeepSpeed cannot be compiled on this machine.

    DeepSpeed compiles it after the model is loaded.
    """
    if not training.deepspeed:
        return
    flag, config = deepspeed_flag(training.deepspeed), training.hf_deepspeed_config
    is_offloaded = zero_of(training)[1]
    kind = config.get_value("optimizer.type")
    if kind is not None:
        if config.get_value("optimizer.params.torch_adam", False):
            return
        subject, name = f"{flag}: the optimizer {kind!r}", kind.lower()
        if name in NEED_MUP and importlib.util.find_spec("mup") is None:
            raise UserError(f"{subject} needs the package mup; install it (pip install mup), or use AdamW")
        operator = OFFLOADED_OPERATORS.get(name) if is_offloaded else None
        operator = operator or OPERATORS.get(name)
    elif is_offloaded and config.get_value("zero_force_ds_cpu_optimizer", True):
        operator = OFFLOADED_OPTIM.get(OptimizerNames(optimizer_name(training)))
        subject = f"{flag}: the offloaded optimizer"
        if operator is None:
            raise UserError(
                f"--optim {optimizer_name(training)}: {flag} offloads the optimizer, and accelerate would "
                "replace it by Adam of DeepSpeed; use adamw_torch, or remove 'offload_optimizer'"
            )
    else:
        return
    if operator is not None:  # None: an optimizer of torch
        _check_operator(operator, subject)


def _check_operator(operator: str, subject: str) -> None:
    """Raise `UserError` if DeepSpeed lacks an operator for this device, or it cannot be compiled."""
    # DeepSpeed is slow to import and is needed only here.
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    device = get_accelerator()
    builder = device.create_op_builder(f"{operator}Builder")
    if builder is None or builder.name == NOT_IMPLEMENTED:
        raise UserError(
            f"{subject} needs {operator}, which DeepSpeed does not have for the device "
            f"{device.device_name()}; use AdamW"
        )
    if installed_ops.get(builder.name, False):
        return
    compiler = cpp_extension.get_cxx_compiler()
    missing = {
        f"a C++ compiler ({compiler})": shutil.which((compiler.split() or [""])[0]) is None,
        "the headers of Python (python3-dev)": not Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "ninja": not cpp_extension.is_ninja_available(),
        "the CUDA toolkit (CUDA_HOME)": device.device_name() == "cuda" and cpp_extension.CUDA_HOME is None,
    }
    names = [name for name, is_missing in missing.items() if is_missing]
    if names:
        raise UserError(
            f"{subject} needs {operator}, which is compiled when it is first used, and this machine lacks "
            f"{', '.join(names)}; install that, or use torch's AdamW (no 'optimizer' and no "
            "'offload_optimizer' in the file)"
        )
