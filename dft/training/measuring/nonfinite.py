"""Detect non-finite losses and gradients, and name the step, rank and conversations they come from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from dft.console import say
from dft.errors import UserError
from dft.training.checkpoints.folder import newest_checkpoint
from dft.training.measuring.device_skip import (
    HostCopy,
    ScheduleState,
    can_skip_on_device,
    skip_if_nonfinite,
)
from dft.training.patches import set_step_skipped, set_update_skipped

MAX_CONSECUTIVE_SKIPS = 20
"""Maximum number of consecutive steps that `--on_nonfinite skip` skips before it stops the run."""
MAX_NAMED = 20
"""Maximum number of conversations per rank that a message names."""


def pass_on_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss, with a non-finite gradient if the loss itself is not finite.

    A weight of 0 hides an infinite nll from the gradient. All ranks see the same gradient norm without
    another collective, so the norm must be non-finite too. A finite loss is returned unchanged.
    """
    return loss * (1 + 0 * loss.detach())


@dataclass
class NonfiniteReport:
    """Information of a rank about a step with a non-finite gradient.

    Attributes:
        rank: its number.
        loss_is_finite: whether the losses of all its micro-batches are finite.
        conversations: conversations with a token whose nll is not finite; if there are none, all of its
            batches.
    """

    rank: int
    loss_is_finite: bool
    conversations: list[str]

    def __str__(self) -> str:
        named = ", ".join(self.conversations[:MAX_NAMED]) or "conversations of unknown origin"
        if (more := len(self.conversations) - MAX_NAMED) > 0:
            named += f" and {more} more"
        what = "gradient, though not the loss," if self.loss_is_finite else "loss"
        return f"the {what} of {named} on rank {self.rank}"


@dataclass
class StepWatch:
    """The micro-batches of an optimizer step, kept until its gradient is known to be finite."""

    losses: list[Tensor] = field(default_factory=list)
    batches: list[tuple[Tensor, Mapping[str, Any]]] = field(default_factory=list)
    before: tuple[Tensor, ...] = ()

    def add(self, loss: Tensor, nll: Tensor, inputs: Mapping[str, Any], *totals: Tensor) -> None:
        """Add one micro-batch without synchronizing with the device.

        Args:
            loss: scalar.
            nll: (tokens,) of its supervised tokens.
            inputs: the batch, as the collator made it.
            totals: running sums to which the micro-batch is about to be added.
        """
        if not self.losses:
            self.before = tuple(total.clone() for total in totals)
        names = ("loss_positions", "sequence_ids", "origins")
        self.losses.append(loss.detach())
        self.batches.append((nll, {name: inputs[name] for name in names if name in inputs}))

    def roll_back(self, *totals: Tensor) -> None:
        """Set the running sums back to their values before the step."""
        for total, before in zip(totals, self.before, strict=True):
            total.copy_(before)

    def roll_back_if(self, condition: Tensor, *totals: Tensor) -> None:
        """Set the running sums back if a condition on the device holds, without synchronizing."""
        for total, before in zip(totals, self.before, strict=True):
            total.copy_(torch.where(condition, before, total))

    def report(self, rank: int, files: Sequence[str]) -> NonfiniteReport:
        """Return this rank's information about the step. Synchronizes with the device."""
        is_finite = all(bool(loss.isfinite()) for loss in self.losses)
        named = self._named(files, whole=False) or self._named(files, whole=True)
        return NonfiniteReport(rank, is_finite, named)

    def _named(self, files: Sequence[str], whole: bool) -> list[str]:
        names = [name for batch in self.batches for name in _origins(*batch, files, whole)]
        return list(dict.fromkeys(names))  # a conversation may have several sequences


@dataclass(frozen=True)
class UnsettledStep:
    """An optimizer step of which the host does not know yet whether its gradient is finite.

    Attributes:
        number: number of the step.
        watch: its micro-batches.
        is_nonfinite: 1 if its gradient is not finite and the device skipped its update, else 0.
        schedule: position of the learning-rate schedule before it advanced at the end of the step.
        files: names of the files that the conversations come from.
    """

    number: int
    watch: StepWatch
    is_nonfinite: HostCopy
    schedule: ScheduleState
    files: Sequence[str]


class NonfiniteGuard:
    """Keeps non-finite losses and gradients from reaching the weights.

    On a GPU, fused Adam skips such a step by itself, and the host learns of it before the update of the next
    step at the latest (`settle`). The host then waits for the norm of a step while the device computes the
    next one. Otherwise it waits for the norm before each update. The result is the same.

    Args:
        policy: "stop" the run, or "skip" the step.
        accelerator: the run's accelerator.
        output_dir: folder of the checkpoints, for messages.
        fp16: whether the run computes in float16 with a loss scale.

    Attributes:
        made_update: whether the last step is known to update the weights.
    """

    def __init__(self, policy: str, accelerator: Accelerator, output_dir: Path, fp16: bool) -> None:
        self._policy = policy
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._fp16 = fp16
        self._step = StepWatch()
        self._unsettled: UnsettledStep | None = None
        self._skipped = 0
        self.made_update = False

    @property
    def unsettled_step(self) -> int | None:
        """Number of the step that `settle` has not been called for; None if there is none."""
        return None if self._unsettled is None else self._unsettled.number

    def reset(self) -> None:
        """Discard the current step, before a run."""
        self._step = StepWatch()
        if self._unsettled is not None:
            set_update_skipped(self._unsettled.schedule.optimizer.optimizer, None)
            self._unsettled = None

    def watch(self, loss: Tensor, nll: Tensor, inputs: Mapping[str, Any], *totals: Tensor) -> Tensor:
        """Record a micro-batch, see `StepWatch.add`. Return the loss to backpropagate."""
        self._step.add(loss, nll, inputs, *totals)
        return pass_on_nonfinite(loss)

    def handle_gradient(
        self,
        norm: Tensor | float,
        step: int,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        scheduler: Any,
        files: Sequence[str],
        *totals: Tensor,
    ) -> None:
        """Stop the run or skip the step if its gradient is not finite.

        All ranks must call it before the update of every step, and `settle` first. By then, DeepSpeed has
        already made or skipped the update: ZeRO skips it if the norm is not finite, and settings with which
        it would not are refused (`dft.arguments.conflicts`). Synchronizes with the device once per step,
        unless the step can be skipped on the device.

        Args:
            norm: gradient norm, the same on all ranks.
            step: number of the step that is being computed.
            model: its gradients are dropped if the step is skipped.
            optimizer: accelerate's.
            scheduler: the learning-rate schedule.
            files: names of the files that the conversations come from.
            totals: the running sums given to `watch`; a skipped step is subtracted from them.

        Raises:
            UserError: the norm is not finite and the run must stop.
        """
        assert self._unsettled is None
        watch, self._step = self._step, StepWatch()
        self.made_update = False
        if self._must_skip_itself:
            set_step_skipped(optimizer, False)
        if isinstance(norm, Tensor) and self._can_skip_on_device(norm, optimizer):
            watch.roll_back_if(~norm.isfinite(), *totals)
            is_nonfinite = skip_if_nonfinite(norm, optimizer)
            schedule = ScheduleState.capture(optimizer, scheduler)
            self._unsettled = UnsettledStep(step, watch, is_nonfinite, schedule, files)
        elif math.isfinite(norm.item() if isinstance(norm, Tensor) else norm):
            self._skipped, self.made_update = 0, True
        elif self._refuse(step, watch, files):
            if self._must_skip_itself:
                model.zero_grad()  # set to None, because parameters without a gradient are not updated
                set_step_skipped(optimizer, True)  # so that the schedule does not advance
            watch.roll_back(*totals)

    def settle(self) -> float | None:
        """Stop the run, or complete the skipping, if the last step was skipped on the device.

        All ranks must call it before a step is logged, evaluated or saved, and before the update of the next
        one. Waits for the norm of the last step, if it has not been called since.

        Returns:
            The learning rate to which the schedule returned, if the step was skipped.

        Raises:
            UserError: the norm was not finite and the run must stop.
        """
        step, self._unsettled = self._unsettled, None
        if step is None:
            return None
        set_update_skipped(step.schedule.optimizer.optimizer, None)
        if not step.is_nonfinite.read():
            self._skipped = 0
            return None
        self._refuse(step.number, step.watch, step.files)
        return step.schedule.restore()

    def roll_back(self, *totals: Tensor) -> None:
        """Subtract the micro-batches of an unfinished step from the running sums."""
        if self._step.losses:
            self._step.roll_back(*totals)
            self._step = StepWatch()

    def _refuse(self, step: int, watch: StepWatch, files: Sequence[str]) -> bool:
        """Stop the run, or warn of a step to skip. Return whether it is to be skipped here."""
        reports = gather_object([watch.report(self._accelerator.process_index, files)])
        if self._can_lower_loss_scale and all(report.loss_is_finite for report in reports):
            return False  # the loss scale is lowered and the step skipped, as always in float16
        self._skipped += 1
        if self._policy == "stop" or self._skipped > MAX_CONSECUTIVE_SKIPS:
            checkpoint, _ = newest_checkpoint(self._output_dir, resumable=False)
            path = None if checkpoint is None else str(checkpoint.path)
            raise UserError(stop_message(step, reports, path, self._skipped - 1))
        say(f"warning     {skip_message(step, reports)}")
        return True

    def _can_skip_on_device(self, norm: Tensor, optimizer: AcceleratedOptimizer) -> bool:
        is_sharded = self._accelerator.distributed_type == DistributedType.FSDP
        return self._must_skip_itself and not is_sharded and can_skip_on_device(norm, optimizer)

    @property
    def _loss_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scale, if any; on a CPU, accelerate computes in float16 without one."""
        scaler = self._accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def _uses_deepspeed(self) -> bool:
        return self._accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _must_skip_itself(self) -> bool:
        """True if neither DeepSpeed nor a loss scaler skips the step."""
        return not self._uses_deepspeed and self._loss_scaler is None

    @property
    def _can_lower_loss_scale(self) -> bool:
        """True if the cause may be a loss scale that can still be lowered."""
        if self._uses_deepspeed:
            return self._fp16  # its loss scaler stops by itself
        return self._loss_scaler is not None and self._loss_scaler.get_scale() > 1


def _origins(nll: Tensor, batch: Mapping[str, Tensor], files: Sequence[str], whole: bool) -> list[str]:
    """Return `file:line` of the conversations with a token that is not finite, or of the whole batch."""
    if len(batch) < 3:
        return []  # from a custom collator
    origins = batch["origins"]
    if not whole:
        of_tokens = batch["sequence_ids"].flatten()[batch["loss_positions"]]
        origins = origins[of_tokens[~nll.isfinite()].unique()]
    return [origin_name(file, line, files) for file, line in origins.tolist() if file >= 0]


def origin_name(file: int, line: int, files: Sequence[str]) -> str:
    """Return `file:line` of a conversation."""
    return f"{files[file]}:{line}" if file < len(files) else f"file {file}:{line}"


def stop_message(step: int, reports: list[NonfiniteReport], checkpoint: str | None, skipped: int) -> str:
    """Return the error with which all ranks exit. `skipped`: number of steps skipped before it."""
    after = f", and neither were the {skipped} steps before it" if skipped else ""
    saved = f"the newest checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    or_skip = "" if skipped else ", or skip such steps with --on_nonfinite skip"
    return (
        f"step {step}: {_describe(reports)}{after}. The weights were not updated; {saved}. Look at these "
        f"conversations, lower --learning_rate{or_skip}"
    )


def skip_message(step: int, reports: list[NonfiniteReport]) -> str:
    """Return the warning about a skipped step."""
    return f"step {step} is skipped: {_describe(reports)}"


def _describe(reports: list[NonfiniteReport]) -> str:
    relevant = [report for report in reports if not report.loss_is_finite] or reports
    return f"{'; '.join(map(str, relevant))} is not finite"
