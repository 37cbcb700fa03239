"""Decide whether an evaluation is eligible for the best checkpoint, and whether it was loaded."""

import math
from collections.abc import Mapping

import transformers
from transformers import TrainerState
from transformers.trainer_utils import SaveStrategy

from dft.console import say


def can_be_best(metrics: Mapping[str, float], args: transformers.TrainingArguments, is_saving: bool) -> bool:
    """Return whether an evaluation may be compared with the best one so far.

    Args:
        metrics: metrics of the evaluation.
        is_saving: whether a checkpoint is about to be saved. An evaluation between two saves leaves no
            checkpoint, so it cannot have the best one.
    """
    if args.save_strategy != SaveStrategy.BEST and not is_saving:
        return False
    name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    if name not in metrics:
        say(f"warning     no {name} in this evaluation, so it cannot have the best checkpoint")
        return False
    # If nll is not finite, acc may still be finite but is meaningless.
    return math.isfinite(metrics.get("eval_nll", 0.0))


def weights_step(state: TrainerState, args: transformers.TrainingArguments, is_training: bool) -> int:
    """Return the optimizer step of the model's weights.

    Args:
        state: the trainer's state.
        args: the training arguments.
        is_training: whether the run has not ended; at its end, Trainer loads the best model if asked to.
    """
    if args.load_best_model_at_end and not is_training and state.best_model_checkpoint is not None:
        return state.best_global_step
    return state.global_step
