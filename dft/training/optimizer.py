"""Check that the optimizer and learning-rate schedule accept their arguments, before the model is loaded."""

import json

import torch
import transformers
from transformers.training_args import OptimizerNames

from dft.arguments.training import TrainingArguments
from dft.errors import UserError
from dft.training.trainer import DFTTrainer

UNSUPPORTED_OPTIMIZERS = (
    OptimizerNames.LOMO, OptimizerNames.ADALOMO, OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE, OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
)  # fmt: skip
"""Optimizers that update weights before the gradient norm of the step is known."""


def check_optimizer(training: TrainingArguments) -> None:
    """Raise `UserError` if the optimizer or the learning-rate schedule does not accept its arguments.

    Both are created for a dummy parameter. With --optim_target_modules, only the package is checked.
    """
    flag = f"--optim {training.optim.value}"
    if training.optim in UNSUPPORTED_OPTIMIZERS:
        raise UserError(
            f"{flag}: updates the weights during the backward pass, before the gradient is known to be "
            "finite; choose another, such as adafactor or adamw_8bit, which need little memory as well"
        )
    if training.optim_target_modules:
        try:
            DFTTrainer.get_optimizer_cls_and_kwargs(training, torch.nn.Linear(1, 1))
        except ImportError as error:
            raise UserError(f"{flag}: {' '.join(str(error).split())}") from None
        except ValueError:
            pass  # the layer has no such modules
        return
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    try:
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
