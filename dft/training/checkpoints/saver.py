"""Save the checkpoints and the final model of a run: the sequence of steps, from writing to uploading."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from dft.training.checkpoints.hub import HubPublisher
from dft.training.checkpoints.run_state import RunFacts, StepProgress, export_callbacks, weights_step
from dft.training.checkpoints.verify import SaveVerifier
from dft.training.checkpoints.writer import (
    CheckpointWriter,
    complete_model_folder,
    keep_foreign_card,
    model_files,
    note_best_checkpoint,
    write_card,
)
from dft.training.parallel.stopping import Stopped
from dft.training.parallel.waiting import wait_until
from dft.training.run_options import RunOptions


@dataclass(frozen=True)
class SavedRun:
    """Snapshot of a run to be saved.

    Attributes:
        model: the model.
        forward: the same, wrapped for training.
        state: the trainer's state.
        is_training: whether it is saved in training; afterwards, the model may be the best one.
        callbacks: whose state is saved.
        write_model: writes the model and its tokenizer to a folder, on all ranks.
        write_training_state: writes everything else that resuming needs to a folder, on all ranks.
    """

    model: nn.Module
    forward: nn.Module
    state: TrainerState
    is_training: bool
    callbacks: Iterable[Any]
    write_model: Callable[[Path], None]
    write_training_state: Callable[[Path], None]


class RunSaver:
    """Saves the checkpoints and the final model of a run. All ranks must call every method.

    Args:
        args: the training arguments.
        options: settings of the run.
        accelerator: the run's accelerator.
        tokenizer: saved along with the model, if any.
        publisher: uploads saved folders, if the arguments request it.
    """

    def __init__(
        self,
        args: transformers.TrainingArguments,
        options: RunOptions,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase | None,
        publisher: HubPublisher,
    ) -> None:
        self._args = args
        self._options = options
        self._accelerator = accelerator
        self._publisher = publisher
        self._writer = CheckpointWriter(accelerator, args.should_save)
        self._verifier = SaveVerifier(
            options.verify_save, args, tokenizer, options.trust_remote_code, accelerator
        )

    def save_checkpoint(self, folder: Path, run: SavedRun, facts: RunFacts, progress: StepProgress) -> None:
        """Save a checkpoint, upload it in the background, and remove older ones.

        Raises:
            UserError: it could not be saved, or differs from the trained model. Earlier ones are left
                unchanged.
        """
        self._options.heartbeat.beat()
        args, state = self._args, run.state
        is_full = progress.is_stopping or not args.save_only_model
        if args.push_to_hub:
            # The folder is replaced if this step was saved before, and each folder in use takes disk space.
            publisher = self._publisher
            self._wait(lambda: not publisher.is_uploading(folder) and len(publisher.folders_in_use()) <= 1)
        with self._writer.stage(folder, facts.manifest(state.global_step, is_full)) as staging:
            run.write_model(staging)
            self._verify(staging, folder, run, is_checkpoint=True)
            note_best_checkpoint(state, folder)
            if is_full:
                run.write_training_state(staging)
            if args.should_save:
                export_callbacks(state, run.callbacks)
                state.save_to_json(str(staging / TRAINER_STATE_NAME))
        progress.saved_step = state.global_step if is_full else progress.saved_step
        if args.push_to_hub and self._accelerator.is_main_process:
            is_last = progress.is_stopping or state.global_step >= state.max_steps
            self._publisher.push_checkpoint(folder, state.global_step, is_last)
        self.rotate(folder.parent, state)

    def rotate(self, run: Path, state: TrainerState) -> None:
        """Remove the oldest checkpoints beyond `--save_total_limit` that are not being uploaded."""
        limit, best = self._args.save_total_limit, state.best_model_checkpoint
        self._writer.rotate(run, limit, best, self._publisher.folders_in_use())

    def save_model(self, folder: Path, run: SavedRun, message: str | None = None) -> None:
        """Save the final model. An earlier one is replaced once the new one is complete.

        Args:
            folder: target folder.
            run: what to save.
            message: commit message for pushing it to the hub; None to not push it.

        Raises:
            UserError: on all ranks, if it could not be saved or differs from the trained model (an earlier
                model is then left unchanged), or if the hub is unreachable or rejects it (it has been saved
                by then).
        """
        files: list[str] = []
        with self._writer.stage_model(folder) as staging:
            run.write_model(staging)
            self._verify(staging, folder, run, is_checkpoint=False)
            if self._args.should_save:
                keep_foreign_card(staging, folder)
                files = model_files(staging)
                self._options.model_files[:] = files
        if message is None:
            return
        if self._accelerator.is_main_process:
            self._publisher.push_model(folder, files, message)
        self.finish_uploads()

    def complete_model(self, folder: Path, run: SavedRun, model_digest: str) -> None:
        """Add the files that Trainer does not write: the base record, generation settings and card."""
        if not self._args.should_save:
            return
        complete_model_folder(folder, run.model, model_digest)
        if self._options.card is not None:
            step = weights_step(run.state, self._args, run.is_training)
            text = partial(self._options.card, run.state, step)
            write_card(folder, Path(self._args.output_dir), text)

    def finish_uploads(self) -> None:
        """Wait for all uploads, if there can be any, see `HubPublisher.finish`."""
        if self._args.push_to_hub:
            self._publisher.finish(self._accelerator, self._options.heartbeat.beat)

    @contextmanager
    def finishing_uploads(self, state: Callable[[], TrainerState]) -> Iterator[None]:
        """Wait for all uploads when the context ends or the run stops. Abandon them after an error."""
        stopped, has_failed = None, True
        try:
            yield
            has_failed = False
        except Stopped as error:
            stopped, has_failed = error, False
        finally:
            if has_failed:
                self._publisher.abandon()
        if self._args.push_to_hub:
            self.finish_uploads()
            self.rotate(Path(self._args.output_dir), state())  # folders being uploaded were kept before
        if stopped is not None:
            raise stopped

    def _verify(self, staging: Path, folder: Path, run: SavedRun, is_checkpoint: bool) -> None:
        self._options.heartbeat.beat()
        self._verifier.check(staging, folder, run.model, run.forward, is_checkpoint)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        wait_until(is_done, self._accelerator, self._options.heartbeat.beat)
