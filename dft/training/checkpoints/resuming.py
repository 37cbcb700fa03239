"""transformers' Trainer, going on from a checkpoint as if there had been no interruption."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from dft.console import say
from dft.errors import UserError
from dft.training.checkpoints.folder import NO_PICKLE, newest_checkpoint, open_checkpoint, reading
from dft.training.checkpoints.resharding import mend_zero3, resharded
from dft.training.checkpoints.resume_point import check_same_model, named_checkpoint
from dft.training.checkpoints.saving import RUN_STATE, LastStep, PendingEvents, SavingTrainer
from dft.training.parameters import shapes_digest


class ResumingTrainer(SavingTrainer):
    """How a run goes on from a checkpoint, in the midst of a step if need be. Knows nothing of the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_from: str | None = None

    def _take_up(self, kept: Mapping[str, Any]) -> None:
        """Goes on from what `_state_to_keep` gave."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trainer's. True goes on from the newest complete checkpoint.

        Raises:
            UserError: there is none, or it is one of another model, or damaged.
        """
        if resume_from_checkpoint is True:
            found, _ = newest_checkpoint(Path(self.args.output_dir))
            if found is None:
                raise UserError(f"there is no complete checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found.path)
        if resume_from_checkpoint:
            check_same_model(named_checkpoint(Path(resume_from_checkpoint)), shapes_digest(self.model))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._resumed_from = kwargs.get("resume_from_checkpoint")
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # transformers takes from the checkpoint how often to log, evaluate and save, and warns of flags that
        # say otherwise. Here the flags count.
        logger = logging.getLogger("transformers.trainer_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            found = super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            logger.setLevel(level)
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        return found

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        prepare = super()._prepare_for_training
        if resume_from_checkpoint is None:
            return prepare(max_steps, train_dataloader, None)
        with reading(Path(resume_from_checkpoint), NO_PICKLE):
            return self._prepare_to_go_on(prepare, max_steps, train_dataloader, resume_from_checkpoint)

    def _prepare_to_go_on(
        self,
        prepare: Callable[..., Any],
        max_steps: int,
        train_dataloader: DataLoader,
        resume_from_checkpoint: str,
    ) -> Any:
        if not self.is_deepspeed_enabled:
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        checkpoint = open_checkpoint(Path(resume_from_checkpoint))
        if not (checkpoint.path / "latest").is_file():  # DeepSpeed's, of rank 0
            raise UserError(
                f"--resume_from_checkpoint {checkpoint.path}: only a part of it is on this machine; "
                "DeepSpeed goes on from a checkpoint that all machines see as a whole, so let --output_dir "
                "be on a disk that they share"
            )
        if checkpoint.facts["ranks"] == self.args.world_size:
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        with resharded(checkpoint.path, Path(self.args.output_dir), self.accelerator) as folder:
            prepared = prepare(max_steps, train_dataloader, str(folder))
            if self.deepspeed.zero_optimization_partition_weights():
                mend_zero3(self.deepspeed.optimizer, folder)
            return prepared

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer's, but of weights that are tied to others, and are saved with those, it says nothing."""
        if isinstance(self.model, PreTrainedModel):
            tied = self.model.all_tied_weights_keys
            load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _run_epoch(self, *, model: nn.Module, start_time: float, **kwargs: Any) -> None:
        if self._resumed_from is not None:
            self._catch_up(model, start_time, kwargs["trial"], kwargs["ignore_keys_for_eval"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer would make one step more
            return
        super()._run_epoch(model=model, start_time=start_time, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> TrainOutput:
        if self._resumed_from is not None:  # at its last step
            self._catch_up(self.model_wrapped, start_time, trial, None)
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _catch_up(self, model: nn.Module, start_time: float, trial: Any, ignored: Any) -> None:
        """Goes on within the step of the checkpoint: what was still to be done after it is done now."""
        folder, self._resumed_from = Path(self._resumed_from), None
        with reading(folder):
            kept = json.loads((folder / RUN_STATE).read_text())
            left, self._last = PendingEvents(**kept["left"]), LastStep(**kept["last"])
        ranks, losses = self.args.world_size, kept["losses"]
        self._tr_loss += sum(losses[self.args.process_index :: ranks]) * ranks / len(losses)
        self._total_loss_scalar = kept["total_loss"]
        self._globalstep_last_logged = self._last.logged
        self._take_up(kept)
        for line in self._unlike(open_checkpoint(folder).facts):
            say(line)
        self._load_rng_state(str(folder))  # a save among what is left keeps it
        last, place = self._last, (trial, self.state.epoch, ignored, start_time)
        self._seen_step = 0 if left.end_epoch else self.state.global_step
        if left.evaluate or left.save:
            self.control.should_evaluate, self.control.should_save = left.evaluate, left.save
            self._maybe_log_save_evaluate(self._tr_loss, last.grad_norm, model, *place, last.learning_rate)
        if left.end_epoch:
            self._seen_step = self.state.global_step
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(self._tr_loss, last.grad_norm, model, *place, last.learning_rate)

    def _unlike(self, facts: Mapping[str, Any]) -> Iterator[str]:
        """What cannot go on exactly as it was, a line each."""
        if facts["ranks"] != self.args.world_size:
            yield (
                f"note        saved by {facts['ranks']} ranks, and this run has {self.args.world_size}: "
                "data, optimizer, schedule and metrics go on where they were; random numbers (dropout) "
                "do not, and sums over ranks are rounded otherwise"
            )
        now = self._method()
        before = facts.get("method", now)  # which checkpoints of earlier versions do not tell
        if before != now:
            yield f"warning     up to here the run learned by {before}, and goes on by {now}"
        before, now = facts["order"], self._order()
        if (before["rows"], before["lengths"]) != (now["rows"], now["lengths"]):
            yield (
                f"warning     the training data are not those of the checkpoint ({before['rows']:,} rows "
                f"then, {now['rows']:,} now): it goes on at the same place in another order"
            )
        for name in ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"):
            if before[name] != now[name]:
                yield (
                    f"warning     --{name} was {before[name]} and is {now[name]}: from here on the data come "
                    "in another order"
                )
