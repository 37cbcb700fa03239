"""Record the metrics and speed of a run."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState

from dft.console import say
from dft.loss.dft import TokenStats
from dft.loss.objectives import EveryWeight, Objective
from dft.loss.schedule import CONSTANT, AlphaSchedule, alpha_of, method_title, scheduled
from dft.metrics import HISTOGRAM
from dft.training.batching import dataset_files
from dft.training.measuring.meter import TokenMeter, prefix_with_file_names
from dft.training.measuring.scoring import (
    EXAMPLES,
    ScoredSequence,
    TokenTable,
    origins_of_tokens,
    scored_sequences,
)
from dft.training.measuring.throughput import Clock, ModelFlops, model_flops, peak_flops, peak_memory


class MetricsRecorder:
    """Token-weighted metrics of training and evaluation, throughput, and floating-point operations.

    Args:
        accelerator: the run's accelerator.
        objective: training objective, at the end of its schedule.
        schedule: schedule of alpha.
        end_of_turn_ids: token ids that end a turn.
        end_of_turn_weight: minimum weight of a token that ends a turn.
        log_per_file: whether evaluations report metrics of each data file.
        has_origins: returns whether batches identify the file and conversation of each token.

    Attributes:
        training: sums of the current logging window.
        evaluation: sums of the current or last evaluation.
        examples: some sequences of the last evaluation, on rank 0.
        scored: tables of the scored tokens; None if they are not collected.
        max_steps: number of optimizer steps of the run, over which alpha rises.
        window_flops: floating-point operations of the last logging window.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        schedule: AlphaSchedule = CONSTANT,
        end_of_turn_ids: Sequence[int] = (),
        end_of_turn_weight: float = 0.0,
        log_per_file: bool = False,
        has_origins: Callable[[], bool] = lambda: True,
    ) -> None:
        self.objective = objective
        self.schedule = schedule
        self.end_of_turn_ids = list(end_of_turn_ids)
        self.end_of_turn_weight = end_of_turn_weight
        self.log_per_file = log_per_file
        self._has_origins = has_origins
        self.max_steps = 0
        self.window_flops = 0.0
        self.examples: list[ScoredSequence] = []
        self.scored: list[TokenTable] | None = None
        self._every: EveryWeight | None = None
        self._accelerator = accelerator
        self._files: list[str] = []
        self._clock = Clock()
        self._flops: ModelFlops | None = None
        self._peak_flops: float | None = None
        self.training = self._new_meter()
        self.evaluation = self._new_meter()

    def _new_meter(self, files: int = 0) -> TokenMeter:
        device = self._accelerator.device
        return TokenMeter(device, self.end_of_turn_ids, self.objective, self.end_of_turn_weight, files)

    def objective_at(self, step: int) -> Objective:
        """Return the objective of an optimizer step, counted from 0."""
        return scheduled(self.objective, self.schedule, step, self.max_steps)

    def method(self) -> str:
        """Describe the training objective; equal for runs with the same objective."""
        title = method_title(self.objective, self.schedule, self.end_of_turn_weight)
        return title if self.schedule.kind == CONSTANT.kind else f"{title} ({self.max_steps} steps)"

    def inspect_model(self, model: nn.Module, args: transformers.TrainingArguments) -> None:
        """Determine the number of operations per token, before FSDP flattens the model's weights."""
        self._flops = model_flops(model)
        is_half = args.bf16 or args.fp16 or model.dtype.itemsize == 2
        self._peak_flops = peak_flops(self._accelerator.device) if is_half else None

    def start(self, step: int, max_steps: int) -> None:
        """Start measuring time at an optimizer step."""
        self.max_steps = max_steps
        self._clock.start(step)

    def exclude_time(self, seconds: float) -> None:
        """Exclude `seconds` that just passed from the throughput (evaluation, saving)."""
        self._clock.exclude_time(seconds)

    # ---- training ----

    def load_training(self, rows: list[list[float]]) -> None:
        """Continue a logging window from a checkpoint, see `TokenMeter.load_rows`."""
        self.training.load_rows(rows, self._accelerator)

    def training_metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of the logging window that ends after `step`. All ranks must call it.

        The operations of the window are in `window_flops` afterwards.
        """
        device = self._accelerator.device
        memory = torch.tensor([peak_memory(device)], device=device)
        memory_gib = self._accelerator.gather(memory).max().item()
        reduced = self.training.reduce(self._accelerator)
        seconds, counts = self._clock.window_seconds(step), reduced.counts
        logs = {**reduced.means, "tokens_per_second": counts["tokens"] / seconds}
        logs["supervised_tokens"] = int(counts["supervised"])
        if counts["positions"]:
            logs["padding_share"] = 1 - counts["tokens"] / counts["positions"]
        self.window_flops = self._count_flops(counts)
        if self._peak_flops is not None and self._flops is not None:
            peak = self._peak_flops * self._accelerator.num_processes
            logs["mfu"] = self.window_flops / seconds / peak
        logs["peak_memory_gib"] = memory_gib
        logs["seconds_left"] = self._clock.seconds_left(self.max_steps)
        return logs

    def complete_window(self, logs: Mapping[str, float], state: TrainerState) -> dict[str, float]:
        """Return the metrics of a logging window and the rest of its log line. This is a collective."""
        metrics = self.training_metrics(state.global_step)
        state.total_flos += self.window_flops
        others = {name: value for name, value in logs.items() if name != "loss"}
        return {**metrics, **others, **self._alpha(state)}

    def _alpha(self, state: TrainerState) -> dict[str, float]:
        alpha = alpha_of(self.objective_at(max(0, state.global_step - 1)))
        return {} if alpha is None else {"dft_alpha": alpha}

    def complete_summary(self, logs: dict[str, float], state: TrainerState, train_loss: float) -> None:
        """Complete the last log line of a run in place. This is a collective.

        Args:
            train_loss: mean of the loss over all steps, including those before the run was resumed.
        """
        state.total_flos += self._count_flops(self.training.reduce(self._accelerator).counts)
        logs["total_flos"], logs["train_loss"] = state.total_flos, train_loss

    def _count_flops(self, counts: Mapping[str, float]) -> float:
        """Return the number of operations for a window's tokens; 0 if unknown."""
        if self._flops is None:
            return 0.0
        return self._flops.total(counts["tokens"], counts["pairs"], counts["supervised"])

    # ---- evaluation ----

    @contextmanager
    def evaluating(self, dataloader: DataLoader) -> Iterator[None]:
        """Collect the metrics of an evaluation.

        It does not affect training: its time does not count, and the random state is restored.
        """
        started = time.perf_counter()
        self._files = dataset_files(dataloader.dataset) if self.log_per_file else []
        self.evaluation = self._new_meter(len(self._files))
        self.examples.clear()
        with torch.random.fork_rng(devices=[]):
            yield
        self.exclude_time(time.perf_counter() - started)

    @property
    def scored_by(self) -> Objective:
        """The objective that batches of an evaluation are scored with."""
        return self.objective if self._every is None else self._every

    def add_evaluation(self, stats: TokenStats, inputs: Mapping[str, Any]) -> None:
        """Add a batch to the metrics of the evaluation and keep some of its sequences and tokens."""
        per_file = self._has_origins() and self.log_per_file
        files = origins_of_tokens(inputs)[:, 0] if per_file else None
        self.evaluation.update(stats, inputs, files=files)
        if not self._has_origins():
            return
        if self.scored is not None:
            weights = None if self._every is None else self._every.take()
            self.scored.append(TokenTable.from_batch(stats, inputs, weights))
        missing = EXAMPLES - len(self.examples)
        if missing and self._accelerator.is_main_process:
            self.examples += scored_sequences(stats, inputs, missing)

    @contextmanager
    def scoring(self, objectives: Sequence[Objective] = ()) -> Iterator[list[TokenTable]]:
        """Collect tables of all tokens that are evaluated within the context.

        Args:
            objectives: objectives whose weights the tables hold.

        Raises:
            ValueError: the batches do not identify the source of their tokens.
        """
        if not self._has_origins():
            raise ValueError("score() needs the trainer's own data_collator; leave it out")
        self.scored, self._every = [], EveryWeight(tuple(objectives)) if objectives else None
        try:
            yield self.scored
        finally:
            self.scored = self._every = None

    def evaluation_metrics(self, prefix: str, with_histogram: bool) -> dict[str, Any]:
        """Return the metrics of the evaluation, named `<prefix>_<metric>`. All ranks must call it."""
        reduced = self.evaluation.reduce(self._accelerator)
        metrics = {**reduced.means, **prefix_with_file_names(self._files, reduced.files)}
        metrics["supervised_tokens"] = int(reduced.counts["supervised"])
        if broken := int(reduced.counts["not_numbers"]):
            say(
                f"warning     {broken:,} of {metrics['supervised_tokens']:,} tokens evaluated have a p that "
                "is not a number; they are in no histogram, and this evaluation has no best checkpoint"
            )
        if with_histogram:
            metrics[HISTOGRAM] = reduced.histogram
        return {f"{prefix}_{name}": value for name, value in metrics.items()}
