"""Callback that resumes a run, records which events are due, and stops the run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.arguments.intervals import INTERVALS, interval
from dft.console import say
from dft.training.checkpoints.folder import reading
from dft.training.checkpoints.optimizer_options import learning_rate
from dft.training.checkpoints.run_settings import changes_best, changes_record
from dft.training.checkpoints.run_state import (
    LastStep,
    PendingEvents,
    RandomState,
    RunState,
    StepProgress,
    ends_epoch,
    recorded_settings,
)
from dft.training.components import Components


@dataclass(frozen=True)
class RunFunctions:
    """Operations of the trainer that the callback needs.

    Attributes:
        restore_totals: continues the sums of the loss from a checkpoint.
        load_random_state: sets the random number generators to their state in a checkpoint.
        run_events: logs, evaluates and saves according to the control, reporting the values of the last step.
        end_epoch: calls the callbacks for the end of an epoch.
    """

    restore_totals: Callable[[RunState], None]
    load_random_state: Callable[[str], None]
    run_events: Callable[[LastStep], None]
    end_epoch: Callable[[], None]


class RunEvents(TrainerCallback):
    """Tracks a run. Must be the last callback, since others may change which events are due.

    Args:
        run: the components of the run.
        trainer: operations of the trainer.
    """

    def __init__(self, run: Components, trainer: RunFunctions) -> None:
        self._skips_evaluation = False
        self._run = run
        self._trainer = trainer

    @property
    def _progress(self) -> StepProgress:
        return self._run.progress

    def take_skip(self) -> bool:
        """Return, once per run, whether the next evaluation is that of `eval_on_start` in a resumed run.

        The run has already had this evaluation.
        """
        skips, self._skips_evaluation = self._skips_evaluation, False
        return skips

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set up the metrics, and handle the pending events of the checkpoint that the run resumes from."""
        for name in INTERVALS:  # Trainer would keep the intervals of the checkpoint
            if (value := vars(args)[name]) is not None:
                setattr(state, name, interval(value, state.max_steps))
        state.train_batch_size = args.train_batch_size
        self._run.recorder.start(state.global_step, state.max_steps)
        self._run.facts.method = self._run.recorder.method()
        if self._run.resumer.checkpoint is not None:
            self._catch_up(args, state, control)
        self._skips_evaluation = args.eval_on_start and state.global_step > 0

    def _catch_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        saved, checkpoint = self._run.resumer.take_state()
        self._trainer.restore_totals(saved)
        self._progress.last = saved.last
        self._run.recorder.load_training(saved.meter)
        for line in self._run.facts.differences(checkpoint.facts):
            say(line)
        before, now = recorded_settings(checkpoint.facts), self._run.facts.recorded
        changes = changes_record(before, now, checkpoint.step)
        if changes is not None:
            state.log_history.append(changes)
        early_stopping = self._run.early_stopping
        if changes_best(before, now):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            if early_stopping is not None:
                early_stopping.reset()
        with reading(checkpoint.path):
            self._trainer.load_random_state(str(checkpoint.path))  # saves among the pending events record it
        self._capture_random_state(args)
        pending = saved.pending
        control.should_log = False
        control.should_evaluate, control.should_save = pending.evaluate, pending.save
        if pending.evaluate or pending.save:
            self._begin_events(args, state, control, pending.end_epoch)
            self._trainer.run_events(saved.last)
        if pending.end_epoch:
            control.should_log = control.should_evaluate = control.should_save = False
            self._trainer.end_epoch()
            self._trainer.run_events(saved.last)
        if early_stopping is not None:
            early_stopping.stop_if_exhausted(control)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.due = PendingEvents()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: AcceleratedOptimizer,
        **kwargs: Any,
    ) -> None:
        """Record the learning rate of this step, before any library advances the schedule."""
        self._progress.learning_rate = learning_rate(optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record which events are due after an optimizer step. All ranks must call it.

        Raises:
            UserError: there are events, the gradient was not finite and the run must stop.
        """
        self._run.complete_step()
        self._begin_events(args, state, control, ends_epoch(state))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record which events are due at the end of an epoch. All ranks must call it."""
        self._run.settle_step(state)
        self._begin_events(args, state, control, False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._run.end_run()

    def _begin_events(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, end_epoch: bool
    ) -> None:
        has_events = end_epoch or control.should_log or control.should_evaluate or control.should_save
        stop = self._run.stop
        asked = stop.is_requested() if has_events else stop.is_requested_between_events()
        if asked or has_events:
            self._run.settle_step(state)
        self._progress.begin_events(control, state.global_step, end_epoch, asked)
        self._capture_random_state(args)

    def _capture_random_state(self, args: TrainingArguments) -> None:
        if args.world_size == 1:  # several ranks never save after an error
            self._progress.random_state = RandomState.capture()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the run if it was asked to stop and this checkpoint is complete.

        Raises:
            Stopped: on all ranks.
        """
        step, progress = state.global_step, self._progress
        if progress.is_stopping or (progress.saved_step == step and self._run.stop.is_requested()):
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            raise self._run.stop.stopped(step, str(folder))
