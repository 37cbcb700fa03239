"""Decide whether an evaluation is eligible for the best checkpoint."""

import math
from collections.abc import Mapping

import transformers
from transformers.trainer_utils import SaveStrategy

from dft.console import say
from dft.metrics import parse_name
from dft.training.early_stopping import best_metric_name


def can_be_best(metrics: Mapping[str, float], args: transformers.TrainingArguments, is_saving: bool) -> bool:
    """Return whether an evaluation may be compared with the best one so far.

    Args:
        metrics: metrics of the evaluation.
        is_saving: whether a checkpoint is about to be saved. An evaluation between two saves leaves no
            checkpoint, so it cannot have the best one.
    """
    if args.save_strategy != SaveStrategy.BEST and not is_saving:
        return False
    name = best_metric_name(args)
    if name not in metrics:
        say(f"warning     no {name} in this evaluation, so it cannot have the best checkpoint")
        return False
    # If nll is not finite, acc may still be finite but is meaningless.
    parsed = parse_name(name.removeprefix("eval_"))
    nll = f"{name.removesuffix(parsed[1].name)}nll" if parsed else "eval_nll"
    return math.isfinite(metrics.get(nll, 0.0))
