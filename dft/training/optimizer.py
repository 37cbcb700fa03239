"""Check that the optimizer and learning-rate schedule accept their arguments, before the model is loaded."""

import json

import torch
import transformers
from transformers.training_args import OptimizerNames

from dft.arguments.training import TrainingArguments
from dft.errors import UserError
from dft.training.trainer import DFTTrainer

WHOLE_MODEL_OPTIMIZERS = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
"""Optimizers that need a complete model and cannot be created for a single parameter."""


def check_optimizer(training: TrainingArguments) -> None:
    """Raise `UserError` if the optimizer or the learning-rate schedule does not accept its arguments.

    Both are created for a dummy parameter. Optimizers that need a model, and --optim_target_modules, cannot
    be checked this way.
    """
    if training.optim in WHOLE_MODEL_OPTIMIZERS or training.optim_target_modules:
        return
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    try:
        optimizer_class, options = DFTTrainer.get_optimizer_cls_and_kwargs(training)
        optimizer = optimizer_class([parameter], **options)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"--optim {training.optim.value}: {' '.join(str(error).split())}") from None
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
