"""transformers' Trainer with metrics that are means over tokens, and an eye on what is not finite."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from dft.console import say
from dft.errors import UserError, check_choice
from dft.loss.dft import TokenStats
from dft.loss.objectives import Objective
from dft.loss.schedule import CONSTANT, AlphaSchedule, alpha_of, method_title, scheduled
from dft.metrics import HISTOGRAM
from dft.training.batching import Collator, dataset_files, resolve_end_of_turn_ids
from dft.training.checkpoints.folder import newest_checkpoint
from dft.training.checkpoints.resuming import ResumingTrainer
from dft.training.measuring.meter import TokenMeter, prefix_with_file_names
from dft.training.measuring.nonfinite import (
    MAX_CONSECUTIVE_SKIPS,
    POLICIES,
    StepWatch,
    gather_reports,
    is_finite,
    passing_on_nonfinite,
    skip_message,
    stop_message,
)
from dft.training.measuring.scoring import (
    EXAMPLES,
    ScoredSequence,
    TokenTable,
    origins_of_tokens,
    scored_sequences,
)
from dft.training.measuring.throughput import (
    Clock,
    ModelFlops,
    model_flops,
    peak_flops,
    peak_memory,
)


class MeasuredTrainer(ResumingTrainer):
    """What `DFTTrainer` says about its training, apart from what it does.

    A subclass hands on the statistics of each micro-batch: `_note_training` and `_note_evaluation`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        objective: Objective,
        alpha_schedule: AlphaSchedule,
        end_of_turn_weight: float,
        end_of_turn_ids: Sequence[int] | None,
        log_per_file: bool,
        on_nonfinite: str,
        **kwargs: Any,
    ) -> None:
        check_choice("on_nonfinite", on_nonfinite, POLICIES)
        super().__init__(model, args, **kwargs)
        self.objective = objective
        self.alpha_schedule = alpha_schedule
        self.end_of_turn_weight = end_of_turn_weight
        self.log_per_file = log_per_file
        self.on_nonfinite = on_nonfinite
        self.end_of_turn_ids = resolve_end_of_turn_ids(self.processing_class, end_of_turn_ids)
        self.examples: list[ScoredSequence] = []
        if end_of_turn_weight and not self.end_of_turn_ids:
            raise ValueError("end_of_turn_weight needs end_of_turn_ids, or a tokenizer with an end token")
        self._train_meter = self._meter()
        self._eval_meter = self._meter()
        self._scored: list[TokenTable] | None = None
        self._tr_loss = torch.zeros((), device=args.device)  # Trainer's own sum, made anew in each run
        self._watch = StepWatch()
        self._left_out = 0  # steps in a row
        self._clock = Clock()
        self._flops: ModelFlops | None = None

    def _meter(self, files: int = 0) -> TokenMeter:
        return TokenMeter(
            self.args.device, self.end_of_turn_ids, self.objective, self.end_of_turn_weight, files
        )

    def objective_at(self, step: int) -> Objective:
        """What is descended at an optimizer step, counted from 0."""
        return scheduled(self.objective, self.alpha_schedule, step, self.state.max_steps)

    def _note_training(
        self, loss: Tensor, stats: TokenStats, inputs: Mapping[str, Any], aux_loss: Tensor | None
    ) -> Tensor:
        """Adds a micro-batch to the sums of its logging window. Returns the loss to go backward from."""
        if not self.is_in_train:
            return loss
        self._watch.add(loss, stats.nll, inputs, self._train_meter.sums, self._tr_loss)
        now = self.objective_at(self.state.global_step)
        self._train_meter.update(stats, inputs, aux_loss, objective=now)
        return passing_on_nonfinite(loss)

    def _note_evaluation(self, stats: TokenStats, inputs: Mapping[str, Any]) -> None:
        """Adds a batch to the sums of its evaluation, and keeps what is shown of it afterwards."""
        ours = isinstance(self.data_collator, Collator)
        files = origins_of_tokens(inputs)[:, 0] if ours and self.log_per_file else None
        self._eval_meter.update(stats, inputs, files=files)
        if not ours:
            return
        if self._scored is not None:
            self._scored.append(TokenTable.from_batch(stats, inputs))
        wanted = EXAMPLES - len(self.examples)
        if wanted and self.is_world_process_zero():
            self.examples += scored_sequences(stats, inputs, wanted)

    def exclude_time(self, seconds: float) -> None:
        """What took place just now is no training: it counts in no tokens per second."""
        self._clock.exclude_time(seconds)

    # ---- what is not finite ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm, which all ranks see alike, asked for before the update of a step.

        DeepSpeed has made the update by then, or left it out: ZeRO does so by itself where the norm is not
        finite, and the settings with which it would not are refused (`dft.arguments.conflicts`). The host
        waits for the device here, once a step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.deepspeed is None and self._loss_scaler() is None:
            self.optimizer._is_overflow = False
        if is_finite(norm):
            self._left_out = 0
        else:
            self._refuse_step(model)
        self._watch.clear()
        return norm

    def _refuse_step(self, model: nn.Module) -> None:
        """Stops the run before a gradient that is not finite reaches the weights, or leaves the step out."""
        names = dataset_files(self.train_dataset)
        reports = gather_reports(self._watch.report(self.accelerator.process_index, names))
        if self._is_too_great_for_float16() and all(report.loss_is_finite for report in reports):
            return  # the loss scale is lowered and the step left out, as ever
        step = self.state.global_step + 1
        self._left_out += 1
        if self.on_nonfinite == "stop" or self._left_out > MAX_CONSECUTIVE_SKIPS:
            kept, _ = newest_checkpoint(Path(self.args.output_dir), resumable=False)
            last = None if kept is None else str(kept.path)
            raise UserError(stop_message(step, reports, last, self._left_out - 1))
        say(f"warning     {skip_message(step, reports)}")
        # DeepSpeed leaves such a step out by itself, a loss scale too.
        if self.deepspeed is None and self._loss_scaler() is None:
            model.zero_grad()  # to None, and what has no gradient is not updated
            self.optimizer._is_overflow = True  # as they do, so that no learning rate of the schedule is lost
        self._watch.take_back(self._train_meter.sums, self._tr_loss)

    def _is_too_great_for_float16(self) -> bool:
        """Whether it may be the fault of a loss scale that can still be lowered."""
        if self.deepspeed is not None:
            return self.args.fp16  # its own scale gives up by itself
        scaler = self._loss_scaler()
        return scaler is not None and scaler.get_scale() > 1

    def _loss_scaler(self) -> torch.amp.GradScaler | None:
        """Where there is one: not on a CPU, where accelerate computes in float16 without."""
        scaler = self.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    # ---- the metrics ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics, which are numbers; callbacks and the history have the histogram as well."""
        metrics = super().evaluate(*args, **kwargs)
        return {name: value for name, value in metrics.items() if not isinstance(value, list)}

    def score(self, dataset: Any) -> TokenTable:
        """Every supervised token of a dataset under the model as it is. All ranks get the whole table.

        Raises:
            ValueError: a collator was given, which may not say what a batch is made of.
        """
        if not isinstance(self.data_collator, Collator):
            raise ValueError("score() needs the trainer's own data_collator; leave it out")
        self._scored = []
        try:
            self.evaluation_loop(self.get_eval_dataloader(dataset), "Scoring", prediction_loss_only=True)
            return TokenTable.gather(self._scored)
        finally:
            self._scored = None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with metrics weighted by token in place of a mean over batches."""
        started = time.perf_counter()
        files = dataset_files(dataloader.dataset) if self.log_per_file else []
        self._eval_meter = self._meter(len(files))
        self.examples = []
        with torch.random.fork_rng(devices=[]):  # how often it is evaluated changes nothing in training
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        found = self._eval_meter.reduce(self.accelerator)
        metrics = {**found.means, **prefix_with_file_names(files, found.files)}
        metrics["supervised_tokens"] = int(found.counts["supervised"])
        if broken := int(found.counts["not_numbers"]):
            say(
                f"warning     {broken:,} of {metrics['supervised_tokens']:,} tokens evaluated have a p that "
                "is not a number; they are in no histogram, and no checkpoint is the best by this evaluation"
            )
        if description == "Evaluation":  # what trackers get of a prediction has to be numbers
            metrics[HISTOGRAM] = found.histogram
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.exclude_time(time.perf_counter() - started)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Completes the metrics of a logging window; the rest passes through.

        Callbacks get numbers only; `state.log_history` has the histogram of an evaluation as well.
        """
        if "loss" in logs:
            logs = {**self._window(), **{name: value for name, value in logs.items() if name != "loss"}}
            alpha = alpha_of(self.objective_at(max(0, self.state.global_step - 1)))
            if alpha is not None:
                logs["dft_alpha"] = alpha
        lists = {name: value for name, value in logs.items() if isinstance(value, list)}
        numbers = {name: value for name, value in logs.items() if name not in lists}
        super().log(numbers, start_time)
        logs.update(numbers)
        self.state.log_history[-1].update(lists)

    def _window(self) -> dict[str, float]:
        """Metrics and speed since the last line of the log. A collective."""
        memory = torch.tensor([peak_memory(self.args.device)], device=self.args.device)
        memory = self.accelerator.gather(memory).max().item()
        found = self._train_meter.reduce(self.accelerator)
        seconds = self._clock.window_seconds(self.state.global_step)
        counts = found.counts
        logs = {**found.means, "tokens_per_second": counts["tokens"] / seconds}
        logs["supervised_tokens"] = int(counts["supervised"])
        if counts["positions"]:
            logs["padding_share"] = 1 - counts["tokens"] / counts["positions"]
        halves = self.args.bf16 or self.args.fp16 or self.model.dtype.itemsize == 2
        peak = peak_flops(self.args.device) if halves else None
        done = self._count_flops(counts)
        if peak is not None and self._flops is not None:
            logs["mfu"] = done / seconds / (peak * self.accelerator.num_processes)
        logs["peak_memory_gib"] = memory
        logs["seconds_left"] = self._clock.seconds_left(self.state.max_steps)
        return logs

    def _count_flops(self, counts: Mapping[str, float]) -> float:
        """What a window's tokens cost, added to the run's `total_flos`; 0 where that is not known."""
        if self._flops is None:
            return 0.0
        done = self._flops.total(counts["tokens"], counts["pairs"], counts["supervised"])
        self.state.total_flos += done
        return done

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Nothing: Trainer's estimate asks a sharded model for its size. `_count_flops` counts."""
        return 0

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> TrainOutput:
        self._count_flops(self._train_meter.reduce(self.accelerator).counts)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._watch.clear()
        self._train_meter.reset()  # an earlier run may have ended within a window
        return super()._inner_training_loop(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._flops = model_flops(self.model)  # before FSDP flattens its weights
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._clock.start(self.state.global_step)
        return prepared

    def _method(self) -> str:
        told = method_title(self.objective, self.alpha_schedule, self.end_of_turn_weight)
        rises = self.alpha_schedule.kind != CONSTANT.kind
        return f"{told} ({self.state.max_steps} steps)" if rises else told

    def _state_to_keep(self) -> dict[str, Any]:
        return {"meter": self._train_meter.rows(self.accelerator)}

    def _take_up(self, kept: Mapping[str, Any]) -> None:
        self._train_meter.load_rows(kept["meter"], self.accelerator)

    def _take_back_step(self) -> None:
        super()._take_back_step()
        if self._watch.losses:
            self._watch.take_back(self._train_meter.sums, self._tr_loss)
            self._watch.clear()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.exclude_time(time.perf_counter() - started)
