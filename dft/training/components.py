"""Components to which `DFTTrainer` delegates its work. None of them depends on transformers.Trainer."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import hf_api

from dft.arguments.loss_settings import router_coefficient
from dft.errors import UserError
from dft.loss.head import FusedHead
from dft.loss.objectives import Objective
from dft.loss.schedule import AlphaSchedule
from dft.ranks import sequence_parallel_size
from dft.training.averaging import WeightAverage
from dft.training.batching import Collator, dataset_files, resolve_end_of_turn_ids
from dft.training.checkpoints.data_digest import data_digest
from dft.training.checkpoints.hub import HubPublisher
from dft.training.checkpoints.input_folders import check_not_model_folder
from dft.training.checkpoints.resumer import Resumer
from dft.training.checkpoints.run_settings import (
    EVALUATION_DATA,
    model_settings,
    option_settings,
    training_settings,
)
from dft.training.checkpoints.run_state import RunFacts, RunState, StepProgress
from dft.training.checkpoints.saver import RunSaver, SavedRun
from dft.training.first_step import FirstStepProbe
from dft.training.measuring.nonfinite import NonfiniteGuard
from dft.training.measuring.recorder import MetricsRecorder
from dft.training.memory.out_of_memory import end_out_of_memory, memory_advice, ran_out
from dft.training.model.base_model import FrozenBaseModel
from dft.training.model.compiling import compile_layers
from dft.training.parallel.sequence_parallel import SequenceParallel
from dft.training.parallel.stopping import StopControl
from dft.training.parameters import compute_dtype, shapes_digest
from dft.training.run_options import RunOptions
from dft.training.step_loss import StepLoss


@dataclass(frozen=True)
class LossSettings:
    """Loss settings passed to a trainer, see `DFTTrainer`.

    Attributes:
        config: the configuration of the model.
    """

    objective: Objective
    alpha_schedule: AlphaSchedule
    end_of_turn_weight: float
    end_of_turn_ids: Sequence[int] | None
    base_model: nn.Module | None
    fused_head: str
    config: PretrainedConfig

    @property
    def model_config(self) -> PretrainedConfig:
        """The configuration of the language model."""
        return self.config.get_text_config()

    @cached_property
    def router_coefficient(self) -> float | None:
        """Factor of the auxiliary loss of a mixture of experts that computes one."""
        return router_coefficient(self.model_config)


class Components:
    """All components of a trainer.

    Args:
        model: the model, not wrapped.
        args: the training arguments.
        options: settings of the run.
        accelerator: the run's accelerator.
        loss: settings of the loss.
        collator: returns the current collator, which a user may replace.
        dataset: returns the current training data, which a user may replace.
        tokenizer: saved along with the model, if any.
        log_per_file: whether evaluations report metrics of each data file.
        on_nonfinite: "stop" or "skip".

    Attributes:
        recorder: metrics and speed.
        loss: computes the loss of a micro-batch.
        first_step: measures what a first step of each objective would do.
        stop: coordinates with the other ranks whether to stop.
        early_stopping: ends the run when evaluations no longer improve, if that is asked for.
        guard: keeps non-finite losses and gradients from reaching the weights.
        resumer: finds, checks and loads the checkpoint to resume from.
        publisher: uploads saved models to the hub.
        saver: saves checkpoints and models.
        facts: properties of the current run that manifests record.
        progress: progress of the events after an optimizer step.
        average: the average of the weights, which is empty if the options ask for none.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        options: RunOptions,
        accelerator: Accelerator,
        loss: LossSettings,
        collator: Callable[[], Any],
        dataset: Callable[[], Any],
        tokenizer: PreTrainedTokenizerBase | None,
        log_per_file: bool,
        on_nonfinite: str,
    ) -> None:
        self._args, self._options, self._accelerator, self._dataset = args, options, accelerator, dataset
        self._save_total_limit = args.save_total_limit
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # accelerate would replace its own value with DeepSpeed's and print a warning.
            accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        compile_layers(model, args, accelerator)
        end_of_turn_ids = resolve_end_of_turn_ids(tokenizer, loss.end_of_turn_ids)
        if loss.end_of_turn_weight and not end_of_turn_ids:
            raise ValueError("end_of_turn_weight needs end_of_turn_ids, or a tokenizer with an end token")
        self.recorder = MetricsRecorder(
            accelerator,
            loss.objective,
            loss.alpha_schedule,
            end_of_turn_ids,
            loss.end_of_turn_weight,
            log_per_file=log_per_file,
            has_origins=lambda: isinstance(collator(), Collator),
        )
        sharing = sequence_parallel_size(args)
        self.loss = StepLoss(
            model,
            args.device,
            compute_dtype(args, model),
            collator,
            fused_head=loss.fused_head,
            unwrap=accelerator.unwrap_model,
            ranks=accelerator.num_processes,
            sequences=SequenceParallel(model, sharing, args.train_batch_size) if sharing > 1 else None,
            router_coefficient=loss.router_coefficient,
            base_model=None if loss.base_model is None else FrozenBaseModel(loss.base_model, args.device),
            end_of_turn_weight=loss.end_of_turn_weight,
            end_of_turn_ids=end_of_turn_ids,
        )
        self.first_step = FirstStepProbe(model, self.loss, accelerator, collator)
        self.stop, self.early_stopping = StopControl(options.stop, accelerator), options.early_stopping
        output = Path(args.output_dir)
        self.guard = NonfiniteGuard(on_nonfinite, accelerator, output, args.fp16)
        self.resumer = Resumer(accelerator, output, options.trust_checkpoint, options.heartbeat.beat)
        self.publisher = HubPublisher(
            hf_api(), args.hub_token, args.hub_revision, args.hub_strategy, args.hub_always_push
        )
        self.saver = RunSaver(args, options, accelerator, tokenizer, self.publisher)
        self.facts, self.progress = RunFacts(args, dataset()), StepProgress()
        self.average = WeightAverage(options.ema_decay, accelerator)

    def begin_run(self, resume_from: str | bool | None, model: nn.Module, eval_dataset: Any) -> str | None:
        """Reset the state of an earlier run. Return the folder of the checkpoint to resume from.

        Args:
            resume_from: see `Resumer.resolve`.
            model: the model, before FSDP flattens its weights.
            eval_dataset: the evaluation data, if any.

        Raises:
            UserError: the run would write into the folder of its model, or cannot resume.
        """
        check_not_model_folder(model, Path(self._args.output_dir))
        digest = shapes_digest(model)
        settings = training_settings(self._args, self.resumer.creates_optimizer) | model_settings(model)
        settings |= {EVALUATION_DATA: data_digest(eval_dataset)} | option_settings(self._options)
        folder = self.resumer.resolve(resume_from, digest, settings)
        self.facts = RunFacts(self._args, self._dataset(), digest, settings=settings)
        self.progress = StepProgress()
        self.guard.reset()
        self.recorder.training.reset()  # an earlier run may have ended in the middle of a window
        self.stop.begin_training()
        return folder

    def inspect_model(self, model: nn.Module, forward: nn.Module, checkpoint: str | None) -> None:
        """Check the model before the first step, and begin the average of its weights.

        Args:
            model: the model, possibly wrapped by FSDP.
            forward: the model, possibly wrapped for training.
            checkpoint: the checkpoint that was loaded, if any.

        Raises:
            UserError: see `StepLoss.inspect_model` and `WeightAverage.load`.
        """
        self.average.begin(model, forward, checkpoint)
        self.loss.inspect_model(model, forward)

    def complete_step(self) -> None:
        """Complete an optimizer step. If it may have been skipped, `settle_step` updates the average."""
        self.progress.complete_step()
        if self.guard.made_update:
            self.average.update()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items: Tensor | float | None,
        step: int | None,
        loss_sum: Tensor,
        with_logits: bool,
    ) -> tuple[Tensor, Any]:
        """Return this rank's contribution to the loss of the step, and the model's outputs.

        In training, also add the micro-batch to the metrics of its logging window.

        Args:
            model: the model, possibly wrapped for training.
            inputs: the micro-batch.
            num_items: number of supervised tokens in the whole step on all ranks.
            step: number of completed optimizer steps; None outside of training.
            loss_sum: the running sum to which the loss will be added.
            with_logits: whether the outputs must contain the logits.
        """
        if num_items is None and step is not None:
            raise ValueError(
                "the supervised tokens of the step were not counted; do the batches hold 'labels'?"
            )
        objective = self.recorder.objective
        if step is not None and model.training:
            objective = self.recorder.objective_at(step)
        batch = self.loss.train(model, inputs, objective, num_items, with_logits)
        if step is None:
            return batch.loss, batch.outputs
        sums, aux_loss = self.recorder.training.sums, batch.outputs.get("aux_loss")
        loss = self.guard.watch(batch.loss, batch.stats.nll, batch.inputs, sums, loss_sum)
        self.recorder.training.update(batch.stats, batch.inputs, aux_loss, objective=objective)
        return loss, batch.outputs

    def evaluate(self, model: nn.Module, inputs: Mapping[str, Any], with_logits: bool) -> Any:
        """Add a batch to the metrics of the evaluation and return the model's outputs."""
        _, stats, outputs = self.loss.score(model, inputs, self.recorder.scored_by, with_logits=with_logits)
        self.recorder.add_evaluation(stats, inputs)
        return outputs

    def handle_gradient(
        self,
        norm: Tensor | float,
        state: TrainerState,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        scheduler: Any,
        loss_sum: Tensor,
    ) -> None:
        """Handle the gradient norm of a step before its update, see `NonfiniteGuard.handle_gradient`."""
        self.settle_step(state)
        files, sums = dataset_files(self._dataset()), (self.recorder.training.sums, loss_sum)
        step = state.global_step + 1
        self.guard.handle_gradient(norm, step, model, optimizer, scheduler, files, *sums)
        self.progress.grad_norm = norm

    def settle_step(self, state: TrainerState) -> None:
        """Learn whether the last step was skipped on the device, see `NonfiniteGuard.settle`."""
        step = self.guard.unsettled_step
        try:
            learning_rate = self.guard.settle()
        except UserError:
            assert step is not None
            state.global_step = step - 1  # the last step whose update was made
            raise
        if learning_rate is not None:
            self.progress.learning_rate = learning_rate
        elif step is not None:
            self.average.update()

    def complete_summary(self, logs: dict[str, float], state: TrainerState, total_loss: float) -> None:
        """Complete the last log line of a run, see `MetricsRecorder`. This is a collective.

        After this line and until `end_run`, --save_total_limit has no effect: with a limit of 1, Trainer
        would remove the newest checkpoint, which a longer run resumes from, if another one is the best.

        Args:
            total_loss: the sum of the loss over all steps.
        """
        self.saver.finish_uploads()
        self.recorder.complete_summary(logs, state, total_loss / max(1, state.global_step))
        self._save_total_limit, self._args.save_total_limit = self._args.save_total_limit, None

    def end_run(self) -> None:
        """Restore --save_total_limit at the end of a run, for the next run of the same trainer."""
        self._args.save_total_limit = self._save_total_limit

    def save_checkpoint(self, folder: Path, run: SavedRun) -> None:
        """Save a checkpoint, see `RunSaver.save_checkpoint`. Its time does not count as training."""
        started = time.perf_counter()
        self.saver.save_checkpoint(folder, run, self.facts, self.progress)
        self.recorder.exclude_time(time.perf_counter() - started)

    def save_model(self, folder: Path, run: SavedRun, message: str | None) -> None:
        """Save the final model, with the average of the weights if any, see `RunSaver.save_model`."""
        with self.average.applied():
            self.saver.save_model(folder, run, message)

    def roll_back_step(self, model: nn.Module, state: TrainerState, loss_sum: Tensor) -> bool:
        """Discard an unfinished step, so that the last completed step can be saved.

        Returns:
            Whether there is a completed step that has not been saved.

        Raises:
            UserError: the gradient of the last step was not finite and the run must stop.
        """
        progress = self.progress
        self.settle_step(state)
        if progress.random_state is None or progress.saved_step == state.global_step:
            return False
        model.zero_grad()
        self.guard.roll_back(self.recorder.training.sums, loss_sum)
        progress.random_state.restore()  # the unfinished step has consumed random numbers
        progress.is_stopping = True
        return True

    def write_state(self, folder: Path, losses: list[float], total_loss: float) -> None:
        """Write the state of the run into a checkpoint. All ranks must call it.

        Args:
            losses: the sum of the loss since the last log line, one value per rank.
            total_loss: the sum of the loss over all steps up to the last log line.
        """
        self.average.save(folder, self._args.should_save)
        meter = self.recorder.training.rows(self._accelerator)
        if self._accelerator.is_main_process:
            pending, last = self.progress.pending(), self.progress.last
            RunState(pending, last.on_host(), losses, total_loss, meter).write(folder)

    def describe_memory_error(self, error: Exception, model: nn.Module, step: int) -> str:
        """Describe an out-of-memory error and its remedies; re-raise any other error."""
        if not ran_out(error):
            raise error
        is_fused = isinstance(self.loss.head, FusedHead)
        return memory_advice(model, self._args, self.loss.last_batch, is_fused, error, step)

    def end_out_of_memory(self, message: str, save: Callable[[], None]) -> NoReturn:
        """End the run, see `dft.training.memory.out_of_memory.end_out_of_memory`."""
        end_out_of_memory(message, self._args, self._options.requested_batch, self.loss.last_batch, save)
