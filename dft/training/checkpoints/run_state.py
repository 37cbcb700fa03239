"""State of a run that a checkpoint holds in addition to the state saved by transformers."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from dft.files import write_atomically
from dft.ranks import describe_parallelism, rows_per_step
from dft.training.batching import sequence_lengths
from dft.training.checkpoints.data_digest import data_digest
from dft.training.checkpoints.run_settings import NEW_BEST, OBJECTIVE, change_lines, compares_objective

ORDER_FLAGS = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last")
"""Flags that determine the order of the training data."""
RUN_STATE = "run_state.json"
"""The file of a checkpoint that holds a `RunState`."""


@dataclass
class PendingEvents:
    """Events still pending after the step of a checkpoint. A resumed run handles them first.

    Attributes:
        evaluate: an evaluation was due but postponed because the run was asked to stop.
        save: a regular checkpoint was due but postponed for the same reason.
        end_epoch: the events at the end of an epoch were due, which follow those of its last step.
    """

    evaluate: bool = False
    save: bool = False
    end_epoch: bool = False


@dataclass
class LastStep:
    """Values of the last optimizer step that the log line at the end of an epoch reports.

    Attributes:
        grad_norm: its gradient norm, which may be on the device.
        learning_rate: its learning rate.
        logged: the step of the last log line.
    """

    grad_norm: Tensor | float | None = None
    learning_rate: float | None = None
    logged: int = 0

    def on_host(self) -> "LastStep":
        """Return a copy without tensors. Synchronizes with the device."""
        norm = self.grad_norm
        return replace(self, grad_norm=norm.item() if isinstance(norm, Tensor) else norm)


@dataclass(frozen=True)
class RunState:
    """Contents of `run_state.json`.

    Attributes:
        pending: the events that were still due.
        last: the last optimizer step, without tensors.
        losses: the sum of the loss since the last log line, one value per rank.
        total_loss: the sum of the loss over all steps up to the last log line.
        meter: the sums of the training metrics, one row per rank (`TokenMeter.rows`).
    """

    pending: PendingEvents
    last: LastStep
    losses: list[float]
    total_loss: float
    meter: list[list[float]]

    def write(self, folder: Path) -> None:
        """Write the state into the folder of a checkpoint."""
        state = asdict(self)
        state["left"] = state.pop("pending")  # the name in checkpoints of earlier versions
        write_atomically(folder / RUN_STATE, [json.dumps(state)])

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """Read the state of a checkpoint."""
        state = json.loads((folder / RUN_STATE).read_text())
        return cls(
            PendingEvents(**state["left"]),
            LastStep(**state["last"]),
            state["losses"],
            state["total_loss"],
            state["meter"],
        )

    def loss_of_rank(self, rank: int, ranks: int) -> float:
        """Return the loss sum from which each of `ranks` ranks continues.

        The ranks of the resumed run share the sums of those that saved it; their mean stays the same.
        """
        return sum(self.losses[rank::ranks]) * ranks / len(self.losses)


@dataclass
class RandomState:
    """The state of the random number generators of this process."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> "RandomState":
        """Capture the current state. Does not synchronize with the device."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda)

    def restore(self) -> None:
        """Restore the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass
class StepProgress:
    """Progress of the events after an optimizer step (log, evaluate, save, end of epoch).

    Attributes:
        last: the last completed optimizer step.
        grad_norm: the gradient norm of the current step.
        learning_rate: its learning rate.
        due: events of the last step that have not completed.
        is_stopping: whether the run stops with the next checkpoint.
        saved_step: the step of the last checkpoint that can be resumed from.
        random_state: random state at the completion of the last step; None before that, and with several
            ranks, which never save after an error.
    """

    last: LastStep = field(default_factory=LastStep)
    grad_norm: Tensor | float | None = None
    learning_rate: float | None = None
    due: PendingEvents = field(default_factory=PendingEvents)
    is_stopping: bool = False
    saved_step: int | None = None
    random_state: RandomState | None = None

    def complete_step(self) -> None:
        """Record the values of the step that was just completed."""
        self.last.grad_norm, self.last.learning_rate = self.grad_norm, self.learning_rate

    def begin_events(self, control: TrainerControl, step: int, ends_epoch: bool, is_stopping: bool) -> None:
        """Record which events are due, before the first of them is handled.

        If the run was asked to stop, replace evaluation and regular save, for which there may not be enough
        time, by one save; both are pending in its checkpoint.

        Args:
            control: determines which events are due; modified when the run stops.
            step: number of the optimizer step.
            ends_epoch: whether the events at the end of an epoch are due as well.
            is_stopping: whether the run was asked to stop.
        """
        if control.should_log:
            self.last.logged = step
        self.due = PendingEvents(control.should_evaluate, control.should_save, ends_epoch)
        self.is_stopping = is_stopping
        if is_stopping:
            control.should_evaluate, control.should_save = False, True

    def pending(self) -> PendingEvents:
        """Return the pending events that a checkpoint written now must record."""
        return self.due if self.is_stopping else PendingEvents(end_epoch=self.due.end_epoch)


def ends_epoch(state: TrainerState) -> bool:
    """Return whether the step that was just completed is the last of an epoch or of the run."""
    return float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps


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


class RunFacts:
    """Properties of a run that a checkpoint's manifest records, to check that another run can resume it.

    Args:
        args: the training arguments.
        dataset: the training data, if any.
        model_digest: digest of the names and shapes of the model's weights.
        method: description of the training objective; equal for runs with the same objective.
        settings: see `dft.training.checkpoints.run_settings`.
    """

    def __init__(
        self,
        args: transformers.TrainingArguments,
        dataset: Any,
        model_digest: str = "",
        method: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.args = args
        self.dataset = dataset
        self.model_digest = model_digest
        self.method = method
        self.settings = dict(settings or {})

    @cached_property
    def order(self) -> dict[str, Any]:
        """Everything that determines the training data and their order.

        Computed on first use, since it may read the whole dataset.
        """
        has_length = self.dataset is not None and not isinstance(self.dataset, IterableDataset)
        lengths = np.ascontiguousarray(sequence_lengths(self.dataset) if has_length else [], dtype=np.int64)
        return {
            "rows": len(lengths),
            "lengths": xxhash.xxh3_64_hexdigest(lengths.tobytes()),
            "content": data_digest(self.dataset),
            "seed": self.args.seed,
            "data_seed": self.args.data_seed,
            "train_sampling_strategy": self.args.train_sampling_strategy,
            "dataloader_drop_last": self.args.dataloader_drop_last,
        }

    def manifest(self, step: int, resumable: bool) -> dict[str, Any]:
        """Return the facts for the manifest of a checkpoint, see `dft.training.checkpoints.folder.FACTS`."""
        return {
            "step": step,
            "resumable": resumable,
            "ranks": self.args.world_size,
            "rows_per_step": rows_per_step(self.args),
            "parallelism": describe_parallelism(self.args),
            "order": self.order,
            "model": self.model_digest,
            "method": self.method,
            "settings": self.settings,
        }

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings whose changes the model card lists."""
        return recorded_settings({"method": self.method, "settings": self.settings, "order": self.order})

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """Return a line for each reason why this run cannot continue a checkpoint exactly.

        Args:
            facts: those of the checkpoint's manifest.
        """
        lines = []
        if facts["ranks"] != self.args.world_size:
            lines.append(
                f"note        saved by {facts['ranks']} ranks, and this run has {self.args.world_size}: "
                "data, optimizer, schedule and metrics continue where they were; random numbers (dropout) do "
                "not, and sums over ranks are rounded differently"
            )
        method = facts.get("method", self.method)  # missing in checkpoints of earlier versions
        if method != self.method:
            lines.append(
                f"warning     the checkpoint was trained by {method}, and this run continues by {self.method}"
                f"{NEW_BEST if compares_objective(self.settings) else ''}"
            )
        if self.args.ignore_data_skip:
            lines.append(
                "note        --ignore_data_skip True: the data order of the epoch starts from its beginning, "
                f"so sequences that this epoch has trained before step {facts['step'] + 1:,} are trained "
                "again"
            )
        lines.extend(change_lines(facts.get("settings", {}), self.settings, facts["step"]))
        before, now = facts["order"], self.order
        if (before["rows"], before["lengths"]) != (now["rows"], now["lengths"]):
            lines.append(
                f"warning     the training data differ from those of the checkpoint ({before['rows']:,} rows "
                f"then, {now['rows']:,} now): training continues at the same position in a different order"
            )
        elif before.get("content", now["content"]) != now["content"]:  # missing in earlier versions
            lines.append(
                "warning     the training data differ from those of the checkpoint in tokens, supervision, "
                "weights or base scores: training continues with those of this run at the same position"
            )
        for name in ORDER_FLAGS:
            if before[name] != now[name]:
                lines.append(
                    f"warning     --{name} was {before[name]} and is {now[name]}: from here on the data come "
                    "in a different order"
                )
        return lines


def recorded_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the facts of a manifest whose changes the model card lists.

    Checkpoints of earlier versions lack some of them.
    """
    order = facts["order"]
    settings = dict(facts.get("settings", {}))
    if "method" in facts:
        settings[OBJECTIVE] = facts["method"]
    if "content" in order:
        settings["training data"] = f"{order['rows']:,} rows ({order['content']})"
    return settings | {f"--{name}": order[name] for name in ORDER_FLAGS}


def export_callbacks(state: TrainerState, callbacks: Iterable[Any]) -> None:
    """Add the state of callbacks that have one to the trainer's state, as Trainer does when it saves."""
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            name, exported = type(callback).__name__, callback.state()
            if isinstance(state.stateful_callbacks[name], list):
                state.stateful_callbacks[name].append(exported)
            else:
                state.stateful_callbacks[name] = exported
