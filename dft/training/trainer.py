"""DFTTrainer: transformers' Trainer with the DFT loss, exact resumption and token-weighted metrics.

This is the only file that overrides or calls transformers.Trainer. Each override delegates to components that
do not depend on it. tests/training/test_contract.py checks the private methods that are used here.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from dft.data.batches.sampler import WithBlank
from dft.loss.objectives import Objective, resolve_objective
from dft.loss.schedule import CONSTANT, AlphaSchedule, check_schedule
from dft.training.batching import COLUMNS, padding_id
from dft.training.checkpoints.folder import reading
from dft.training.checkpoints.run_state import LastStep, PendingEvents, RunState
from dft.training.checkpoints.saver import SavedRun
from dft.training.checkpoints.writer import saved_use_cache
from dft.training.components import Components, LossSettings
from dft.training.measuring.best import can_be_best
from dft.training.measuring.callbacks import replace_callbacks
from dft.training.measuring.scoring import TokenTable
from dft.training.memory.out_of_memory import MEMORY_ERRORS
from dft.training.model.weight_names import without_tied
from dft.training.parallel.stopping import StoppedEvaluation
from dft.training.patches import hidden_argument_mismatch
from dft.training.preparation import prepare_arguments, resolve_collator
from dft.training.run_events import RunEvents, RunFunctions
from dft.training.run_options import RunOptions
from dft.training.samplers import DataOrder


class DFTTrainer(transformers.Trainer):
    """Train a causal language model by Dynamic Fine-Tuning (arXiv 2508.05629, Eq. 9).

    The loss of an optimizer step is divided by the supervised tokens of the whole step: all its micro-batches
    on all ranks. It therefore does not depend on how the step is split.

    Args:
        model: a causal language model whose output has `logits` (batch, seq, vocab).
        args: transformers' TrainingArguments.
        alpha: the weight of a token is alpha * p + (1 - alpha); 1, the default, is the paper's DFT, 0 is SFT.
        objective: another rule for the weight instead of alpha, see `dft.loss.objectives`.
        alpha_schedule: schedule by which alpha rises in training; evaluations use its final value.
        end_of_turn_weight: minimum weight of tokens that end a turn, so that stopping is always learned.
        base_model: a copy of the untrained model, for an objective with a `kl_weight`.
        fused_head: "auto" computes the loss without logits (`dft.linear_dft_loss`) if that equals the loss of
            the model's own logits, and prints why if not; "on" requires it; "off" disables it.
        end_of_turn_ids: tokens that end a turn. Default: the end token of `processing_class`.
        log_per_file: whether evaluations report metrics of each file (datasets with `files` and `origins`).
        on_nonfinite: "stop" the run at a non-finite loss or gradient, or "skip" the update.
        data_collator: makes input_ids, labels (-100 where unsupervised, not shifted) and, with padding,
            attention_mask, each (batch, seq), or `num_tokens`. Default: see `choose_collator`.
        options: settings of the run.
        **kwargs: all other arguments of `transformers.Trainer`. Datasets hold `input_ids` and `labels`,
            `seq_lengths` if an example has several sequences, and optionally `origins`, the file and line of
            each, and `loss_weights` and `base_logp`, one for each token.

    Raises:
        ValueError: arguments that contradict each other or change the meaning of the loss, or packed data for
            a model that does not keep packed conversations separate. `train` may raise it as well.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        alpha: float | None = None,
        objective: Objective | None = None,
        alpha_schedule: AlphaSchedule = CONSTANT,
        end_of_turn_weight: float = 0.0,
        base_model: nn.Module | None = None,
        fused_head: str = "auto",
        end_of_turn_ids: Sequence[int] | None = None,
        log_per_file: bool = False,
        on_nonfinite: str = "stop",
        data_collator: Any = None,
        options: RunOptions | None = None,
        **kwargs: Any,
    ) -> None:
        objective = resolve_objective(alpha, objective, base_model is not None)
        check_schedule(objective, alpha_schedule, end_of_turn_weight)
        prepare_arguments(model, args, kwargs, fused_head, on_nonfinite)
        data_collator = resolve_collator(model, args, data_collator, objective, kwargs)
        turns = end_of_turn_weight, end_of_turn_ids
        loss = LossSettings(objective, alpha_schedule, *turns, base_model, fused_head, model.config)
        self.options = options or RunOptions()
        self._saved_use_cache = loss.model_config.use_cache
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        loss.model_config.use_cache = args.use_cache  # Trainer sets only the outer configuration
        data = (lambda: self.data_collator, lambda: self.train_dataset, self.processing_class)
        run = Components(model, args, self.options, self.accelerator, loss, *data, log_per_file, on_nonfinite)
        self._run, self.averaged, run.publisher.repo_id = run, run.average.applied, self.hub_model_id
        self.end_of_turn_ids, self.exclude_time = run.recorder.end_of_turn_ids, run.recorder.exclude_time
        self.examples, self._order, self.first_step = run.recorder.examples, DataOrder(args), run.first_step
        self._tr_loss = torch.zeros((), device=args.device)  # Trainer recreates it in each run
        # compute_loss itself divides by the tokens of the step and does not use the model's own loss, so
        # Trainer must count them regardless of what the model's forward accepts, and must not divide again.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = self.loss_is_scaled_for_ga = True
        self.label_names: list[str] = [*dict.fromkeys([*self.label_names, *COLUMNS])]
        replace_callbacks(self.callback_handler, args, self.options)
        functions = (self._restore_totals, self._load_rng_state, self._run_events, self._end_epoch)
        self._events = RunEvents(run, RunFunctions(*functions))
        run.resumer.creates_optimizer = self.optimizer is self.lr_scheduler is None

    # ---- one run ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train the model. `resume_from_checkpoint=True` resumes from the newest complete checkpoint.

        Raises `UserError` for a checkpoint that cannot be used, `OutOfMemory`, and `Stopped` by a signal.
        """
        folder = self._run.begin_run(resume_from_checkpoint, self.model, self.eval_dataset)
        self.remove_callback(RunEvents)
        self.add_callback(self._events)  # must be the last callback
        try:
            with hidden_argument_mismatch(), self._run.saver.finishing_uploads(lambda: self.state):
                output = super().train(folder, *args, **kwargs)
            return output._replace(training_loss=output.metrics["train_loss"])
        except MEMORY_ERRORS as error:
            message = self._run.describe_memory_error(error, self.model, self.state.global_step + 1)
        # Outside the handler, the exception and the frames that hold the activations have been freed.
        self._run.end_out_of_memory(message, self._save_completed_step)

    def _save_completed_step(self) -> None:
        if self._run.roll_back_step(self.model, self.state, self._tr_loss):
            self._save_checkpoint(self.model_wrapped, None)
        self._run.saver.finish_uploads()  # a restart would end the thread that uploads

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        # Private: no callback runs between creating the optimizer and loading a checkpoint into it.
        self._run.recorder.inspect_model(self.model, self.args)
        with self._run.resumer.loading(resume_from_checkpoint, lambda: self.deepspeed) as folder:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, folder)
        self._run.resumer.apply_options(self.optimizer, self.lr_scheduler)
        self._run.inspect_model(self.model, self.model_wrapped, resume_from_checkpoint)
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning-rate schedule, which is the last step before a checkpoint is loaded."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if optimizer is None:  # DeepSpeed passes its own and calls this from a copy of the trainer
            self._run.resumer.read_options(self.optimizer)
        return scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Private: the public train() loads and trains, and only errors of loading concern the checkpoint.
        with reading(Path(resume_from_checkpoint)):
            if not self._run.resumer.load_model(self.model, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # Private: as above.
        if not self._run.resumer.load_model(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()
        self._run.average.load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Private: as above.
        with reading(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _restore_totals(self, saved: RunState) -> None:
        self._tr_loss += saved.loss_of_rank(self.args.process_index, self.args.world_size)
        self._total_loss_scalar, self._globalstep_last_logged = saved.total_loss, saved.last.logged

    def _run_events(self, last: LastStep) -> None:
        place = (None, self.state.epoch, None, time.time(), last.learning_rate)
        self._maybe_log_save_evaluate(self._tr_loss, last.grad_norm, self.model_wrapped, *place)

    def _end_epoch(self) -> None:
        self.control: TrainerControl = self.callback_handler.on_epoch_end(self.args, self.state, self.control)

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # Private: no callback can prevent the step that Trainer makes after resuming from the last one.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        self._order.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    # ---- one step ----

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, **kwargs: Any
    ) -> DataLoader:
        # Private: the public methods that return dataloaders take no sampler.
        if not isinstance(dataset, IterableDataset):
            dataset, training = WithBlank(dataset, padding_id(self.model)), kwargs.get("is_training")
            sampler_fn = self._order.train_sampler if training else self._order.eval_sampler
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step. The events after the previous step have been handled."""
        self._run.progress.due = PendingEvents()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch and report progress of this rank."""
        self.options.heartbeat.beat()
        return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Return this rank's contribution to the DFT loss of the optimizer step."""
        step = self.state.global_step if self.is_in_train else None
        loss, outputs = self._run.compute_loss(
            model, inputs, num_items_in_batch, step, self._tr_loss, with_logits=return_outputs
        )
        return (loss, outputs) if return_outputs else loss

    def _get_learning_rate(self) -> float:
        # Private: it reads the schedule, which DeepSpeed advances before the step is logged.
        return self._run.progress.learning_rate or 0.0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        # Private: the callback before the optimizer's update does not get the norm.
        norm = super()._get_grad_norm(model, grad_norm)
        self._run.handle_gradient(norm, self.state, model, self.optimizer, self.lr_scheduler, self._tr_loss)
        return norm

    # ---- metrics ----

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Add a batch to the evaluation. Return logits only if the caller computes its own metrics."""
        self.options.heartbeat.beat()
        if self.is_in_train:
            self._run.stop.stop_evaluation_if_requested()
        inputs, has_logits = self._prepare_inputs(inputs), not prediction_loss_only
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._run.evaluate(model, inputs, has_logits)
        return (None, outputs.logits, inputs["labels"]) if has_logits else (None, None, None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the numeric metrics; callbacks and the history receive the histogram as well."""
        if self._events.take_skip():
            return {}
        try:
            with self._run.average.applied():  # also for callbacks, which may generate samples
                metrics = super().evaluate(*args, **kwargs)
        except StoppedEvaluation:
            self._stop_in_evaluation()
        return {name: value for name, value in metrics.items() if not isinstance(value, list)}

    def _stop_in_evaluation(self) -> NoReturn:
        if self.state.global_step:
            self._run.progress.is_stopping = True
            self._save_checkpoint(self.model_wrapped, None)
            # Raises Stopped.
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        raise self._run.stop.stopped(0, None)

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Run Trainer's loop, with metrics weighted by token instead of a mean over batches."""
        recorder, prefix = self._run.recorder, kwargs.get("metric_key_prefix", "eval")
        if not self.is_in_train:
            self._run.loss.forget_head()
        with recorder.evaluating(dataloader), self._run.average.applied():
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
            # Trackers get numbers only of a prediction.
            output.metrics.update(recorder.evaluation_metrics(prefix, description == "Evaluation"))
        return output

    def score(self, dataset: Any, objectives: Sequence[Objective] = ()) -> TokenTable:
        """Score every supervised token of a dataset, with weights of objectives. Every rank gets all tokens.

        Raises `ValueError` if the trainer's collator may not identify the contents of its batches.
        """
        with self._run.recorder.scoring(objectives) as tables:
            self.evaluation_loop(self.get_eval_dataloader(dataset), "Scoring", prediction_loss_only=True)
            return TokenTable.gather(tables)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete the metrics of a logging window. Callbacks receive numbers, the history lists as well."""
        if "loss" in logs:
            logs = self._run.recorder.complete_window(logs, self.state)
        if "train_loss" in logs:  # Trainer's own value counts from the resumption
            self._run.complete_summary(logs, self.state, self._total_loss_scalar)
        lists = {name: value for name, value in logs.items() if isinstance(value, list)}
        numbers = {name: value for name, value in logs.items() if name not in lists}
        super().log(numbers, start_time)
        logs.update(numbers)
        self.state.log_history[-1].update(lists)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: Trainer's estimate needs an unsharded model. The recorder counts instead."""
        return 0

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Private: no callback runs between an evaluation and the choice of the best checkpoint.
        is_candidate = can_be_best(metrics, self.args, self.control.should_save)
        return is_candidate and super()._determine_best_metric(metrics, trial)

    # ---- saving ----

    def _saved_run(self) -> SavedRun:
        run = (self.model, self.model_wrapped, self.state, self.is_in_train)
        callbacks = [*self.callback_handler.callbacks, self.control]
        return SavedRun(*run, callbacks, self._write_model, self._write_training_state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, check it, and push it if the arguments ask for it."""
        message = "Model save" if self.args.push_to_hub and not _internal_call else None
        self._run.save_model(Path(output_dir or self.args.output_dir), self._saved_run(), message)

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **kwargs: Any) -> None:
        """Save the model, push it to the hub, and wait for the upload. All ranks must call it."""
        if self.hub_model_id is None:
            self.init_hf_repo()
            self._run.publisher.repo_id = self.hub_model_id
        folder, message = Path(self.args.output_dir), commit_message or "End of training"
        self._run.save_model(folder, self._saved_run(), message)

    def _write_model(self, folder: Path) -> None:
        with saved_use_cache(self.model, self._saved_use_cache):
            super().save_model(str(folder), _internal_call=True)
        self._run.saver.complete_model(folder, self._saved_run(), self._run.facts.model_digest)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Private: the weights that FSDP gathers hold tied ones twice, and nothing public lies between.
        super()._save(output_dir, without_tied(self.model, state_dict))

    def _write_training_state(self, folder: Path) -> None:
        for save in (self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state):
            save(str(folder))
        losses = self.accelerator.gather(self._tr_loss.detach()[None]).tolist()
        self._run.write_state(folder, losses, self._total_loss_scalar)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Private: Trainer writes directly to the final folder and has no hook around that.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._run.save_checkpoint(folder, self._saved_run())
