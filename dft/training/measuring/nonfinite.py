"""A loss or gradient that is not finite: which step, which rank, which conversations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

POLICIES = ("stop", "skip")
MAX_CONSECUTIVE_SKIPS = 20
"""Steps that are left out one after the other before a run that skips them is stopped: nothing is learned."""
NAMED = 20
"""Conversations of a rank that a message names."""


def passing_on_nonfinite(loss: Tensor) -> Tensor:
    """The loss, whose gradient is not finite where it is not finite itself.

    A weight of 0 hides an infinite nll from the gradient. The norm of the gradient is what all ranks see
    alike without another collective, so it must tell. Of a finite loss nothing changes.
    """
    return loss * (1 + 0 * loss.detach())


@dataclass
class NonfiniteReport:
    """What one rank knows of a step whose gradient is not finite.

    Attributes:
        rank: its number.
        loss_is_finite: in all its micro-batches.
        conversations: those with a token whose nll is not finite; without one, all of its micro-batches.
    """

    rank: int
    loss_is_finite: bool
    conversations: list[str]

    def __str__(self) -> str:
        named = ", ".join(self.conversations[:NAMED]) or "conversations of unknown origin"
        if (more := len(self.conversations) - NAMED) > 0:
            named += f" and {more} more"
        what = "gradient, though not the loss," if self.loss_is_finite else "loss"
        return f"the {what} of {named} on rank {self.rank}"


@dataclass
class StepWatch:
    """The micro-batches of an optimizer step, until its gradient is known to be finite."""

    losses: list[Tensor] = field(default_factory=list)
    batches: list[tuple[Tensor, Mapping[str, Any]]] = field(default_factory=list)
    before: tuple[Tensor, ...] = ()

    def add(self, loss: Tensor, nll: Tensor, inputs: Mapping[str, Any], *totals: Tensor) -> None:
        """Notes one micro-batch, without waiting for the device.

        Args:
            nll: (tokens,) of its supervised tokens.
            inputs: as the collator made it.
            totals: what it is about to be added to.
        """
        if not self.losses:
            self.before = tuple(total.clone() for total in totals)
        known = ("loss_positions", "sequence_ids", "origins")
        self.losses.append(loss.detach())
        self.batches.append((nll, {name: inputs[name] for name in known if name in inputs}))

    def clear(self) -> None:
        self.losses.clear()
        self.batches.clear()
        self.before = ()

    def take_back(self, *totals: Tensor) -> None:
        """Sets totals back to what they were before the step."""
        for total, before in zip(totals, self.before, strict=True):
            total.copy_(before)

    def report(self, rank: int, files: Sequence[str]) -> NonfiniteReport:
        """Whom to name. Waits for the device."""
        finite = all(bool(loss.isfinite()) for loss in self.losses)
        named = self._named(files, whole=False) or self._named(files, whole=True)
        return NonfiniteReport(rank, finite, named)

    def _named(self, files: Sequence[str], whole: bool) -> list[str]:
        names = [name for batch in self.batches for name in _origins(*batch, files, whole)]
        return list(dict.fromkeys(names))  # a conversation may have several sequences


def _origins(nll: Tensor, batch: Mapping[str, Tensor], files: Sequence[str], whole: bool) -> list[str]:
    """`file:line` of the conversations with a token that is not finite, or of the whole batch."""
    if len(batch) < 3:
        return []  # of another collator
    origins = batch["origins"]
    if not whole:
        of_tokens = batch["sequence_ids"].flatten()[batch["loss_positions"]]
        origins = origins[of_tokens[~nll.isfinite()].unique()]
    return [origin_name(file, line, files) for file, line in origins.tolist() if file >= 0]


def origin_name(file: int, line: int, files: Sequence[str]) -> str:
    return f"{files[file]}:{line}" if file < len(files) else f"file {file}:{line}"


def gather_reports(report: NonfiniteReport) -> list[NonfiniteReport]:
    """A collective."""
    return gather_object([report])


def is_finite(norm: Tensor | float) -> bool:
    return math.isfinite(norm.item() if isinstance(norm, torch.Tensor) else norm)


def stop_message(step: int, reports: list[NonfiniteReport], checkpoint: str | None, skipped: int) -> str:
    """For the one error with which all ranks end. `skipped`: the steps before it that were left out."""
    after = f", and neither were the {skipped} steps before it" if skipped else ""
    kept = f"the newest checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    or_skip = "" if skipped else ", or leave such steps out with --on_nonfinite skip"
    return (
        f"step {step}: {_described(reports)}{after}. The weights were not updated; {kept}. Look at these "
        f"conversations, lower --learning_rate{or_skip}"
    )


def skip_message(step: int, reports: list[NonfiniteReport]) -> str:
    return f"step {step} is left out: {_described(reports)}"


def _described(reports: list[NonfiniteReport]) -> str:
    guilty = [report for report in reports if not report.loss_is_finite] or reports
    return f"{'; '.join(map(str, guilty))} is not finite"
