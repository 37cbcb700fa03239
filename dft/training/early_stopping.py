"""Callback that ends a run when the evaluations no longer improve."""

import math
from typing import Any

import transformers
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import EarlyStoppingCallback

from dft.arguments.training import TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, exact after a resumption and independent of when checkpoints are saved.

    It differs from `EarlyStoppingCallback` in what evaluations are compared with. transformers compares them
    with the best checkpoint, and never stops a run that saves none. Here it is the last evaluation that
    counted as an improvement: one that was better than the one before it by more than the threshold. An
    evaluation of the untrained model (`eval_on_start`) counts, and one that is not finite never improves.

    Args:
        early_stopping_patience: number of evaluations in a row without an improvement that end the run.
        early_stopping_threshold: difference that an improvement exceeds.

    Attributes:
        best: the value of the metric that evaluations are compared with; None before the first evaluation.
        best_step: the optimizer step of `best`.
        metric: name of the metric of `best`.
    """

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.reset()

    def reset(self) -> None:
        """Forget the earlier evaluations, because they cannot be compared with the next ones."""
        self.early_stopping_patience_counter = 0
        self.best: float | None = None
        self.best_step = 0
        self.metric = ""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint records."""
        exported = super().state()
        names = ("best", "best_step", "metric")
        exported["attributes"].update({name: vars(self)[name] for name in names})
        return exported

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Continue from the state of the checkpoint, with the patience and the threshold of this run."""
        self.reset()
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        # A checkpoint of a run without early stopping lacks this entry, which saving a checkpoint replaces.
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_evaluate(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Compare an evaluation with the best one. Stop the run if the patience is used up."""
        name = best_metric_name(args)
        if name not in metrics:
            return  # the evaluation of another data set
        value = metrics[name]
        if name != self.metric:
            self.reset()
            self.metric = name
        if math.isfinite(value) and self._improves(value, bool(args.greater_is_better)):
            self.best, self.best_step, self.early_stopping_patience_counter = value, state.global_step, 0
        else:
            self.early_stopping_patience_counter += 1
        self.stop_if_exhausted(control)

    def _improves(self, value: float, greater: bool) -> bool:
        if self.best is None:
            return True
        return (value - self.best if greater else self.best - value) > self.early_stopping_threshold

    @property
    def is_exhausted(self) -> bool:
        """Whether the patience is used up."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def stop_if_exhausted(self, control: TrainerControl) -> None:
        """Stop the run after the current step if the patience is used up."""
        if self.is_exhausted:
            control.should_training_stop = True

    def reason(self) -> str:
        """Describe why the run was stopped."""
        count = self.early_stopping_patience_counter
        threshold = self.early_stopping_threshold
        by = f" by more than {threshold:g}" if threshold else ""
        best = "no value was finite" if self.best is None else f"{self.best:.4g} at step {self.best_step:,}"
        return (
            f"{self.metric} did not improve{by} in {count} evaluation{'' if count == 1 else 's'} in a row; "
            f"best: {best}"
        )


def make_early_stopping(training: TrainingArguments) -> EarlyStopping | None:
    """Return the callback that the flags ask for, if they do."""
    if training.early_stopping_patience is None:
        return None
    return EarlyStopping(training.early_stopping_patience, training.early_stopping_threshold)


def early_reason(state: TrainerState, early_stopping: EarlyStopping | None) -> str:
    """Describe why a run ended before its last step; empty if early stopping did not end it."""
    if early_stopping is None or not early_stopping.is_exhausted or state.global_step >= state.max_steps:
        return ""
    return early_stopping.reason()


def best_metric_name(args: transformers.TrainingArguments) -> str:
    """Return the key of an evaluation that `--metric_for_best_model` compares."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
