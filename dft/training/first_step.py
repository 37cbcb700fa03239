"""What a first optimizer step of an objective would do to the probability of the target tokens.

A step of size t against the gradient g of an objective changes the mean probability of other tokens by
t <grad mean p, -g> / |g|, up to terms of t squared. The gradient of mean p is the negative gradient of the
DFT loss, so the derivative is an inner product of two gradients that the fused head computes anyway. No
weight is changed and no optimizer is created.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from dft.labels import IGNORE_INDEX
from dft.loss.objectives import Dft, Objective, first_step_equivalent
from dft.training.memory.out_of_memory import MEMORY_ERRORS, ran_out
from dft.training.step_loss import StepLoss, evaluating

MAX_TOKENS = {"cpu": 512, "cuda": 2048}
"""Maximum number of tokens of each half of the sample, and of each sequence, which is cut there."""
MAX_SEQUENCES = 16
"""Maximum number of sequences of each half of the sample."""


@dataclass(frozen=True)
class FirstStep:
    """Derivatives of the mean p of one half of a sample along steps computed from the other half.

    Attributes:
        sequences, tokens: numbers of sequences, and of their supervised tokens, in both halves.
        steepest: derivative along the gradient of mean p itself, the largest that a step of size 1 can have.
        rise: derivative along the normalized step of each objective; None where its gradient is 0.
    """

    sequences: int
    tokens: int
    steepest: float
    rise: dict[str, float | None]

    def shares(self) -> dict[str, float | None]:
        """Return the derivatives as shares of the steepest, between -1 and 1: cosines of gradients."""
        return {
            name: None if rise is None or not self.steepest else rise / self.steepest
            for name, rise in self.rise.items()
        }


class FirstStepProbe:
    """Measures the first step of objectives.

    Every rank computes the same numbers from the same sequences, without communication. In addition to the
    weights and the activations of one batch, two gradients are held: less than in training, which holds one
    gradient and the state of the optimizer.

    Args:
        model: the model, not wrapped.
        loss: computes the loss of batches.
        accelerator: the run's accelerator.
        collator: returns the current collator.
    """

    def __init__(
        self, model: nn.Module, loss: StepLoss, accelerator: Accelerator, collator: Callable[[], Any]
    ) -> None:
        self._model, self._loss = model, loss
        self._accelerator, self._collator = accelerator, collator

    def __call__(
        self, dataset: Sequence[Mapping[str, Any]], objectives: Mapping[str, Objective], seed: int = 0
    ) -> FirstStep | str:
        """Return the derivatives, or the reason why they cannot be computed here.

        Args:
            dataset: rows of one sequence each.
            objectives: the objectives, by any name.
            seed: determines which sequences are used.
        """
        if (obstacle := self._obstacle()) is not None:
            return obstacle
        limit = MAX_TOKENS.get(self._accelerator.device.type, 2048)
        halves = choose_halves(dataset, limit, seed)
        if not all(halves):
            return (
                f"it needs two sequences with a supervised token among their first {limit:,} tokens, and the "
                f"sample has {len(halves[0])} of them"
            )
        try:
            return self._measure(*halves, objectives)
        except MEMORY_ERRORS as error:
            if not ran_out(error):
                raise
            return "memory ran out for the gradients"
        finally:
            self._model.zero_grad()

    def _obstacle(self) -> str | None:
        """Return the reason why gradients of the whole model cannot be compared here, or None."""
        kind = self._accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            name = "DeepSpeed ZeRO-3" if kind == DistributedType.DEEPSPEED else "FSDP"
            return f"{name} holds no whole gradient on any rank; a single process computes it"
        if self._accelerator.mixed_precision == "fp16" or any(
            parameter.dtype == torch.float16 for parameter in self._parameters()
        ):
            return "float16 gradients need the loss scale of training; --bf16 True computes it"
        if not self._parameters():
            return "the model has no trainable weights"
        return self._loss.gradient_addition()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _measure(
        self,
        first: Sequence[Mapping[str, Any]],
        second: Sequence[Mapping[str, Any]],
        objectives: Mapping[str, Objective],
    ) -> FirstStep:
        parameters = self._parameters()
        equivalents = {name: first_step_equivalent(objective) for name, objective in objectives.items()}
        with evaluating(self._model), torch.enable_grad(), self._accelerator.autocast():
            reference = self._gradient(second, Dft(), parameters)
            rises = {
                objective: self._rise(first, objective, parameters, reference)
                for objective in dict.fromkeys(equivalents.values())
            }
        rise = {name: rises[objective] for name, objective in equivalents.items()}
        tokens = sum(_supervised(row) for row in (*first, *second))
        return FirstStep(len(first) + len(second), tokens, inner(reference, reference) ** 0.5, rise)

    def _rise(
        self,
        rows: Sequence[Mapping[str, Any]],
        objective: Objective,
        parameters: Sequence[nn.Parameter],
        reference: Sequence[Tensor | None],
    ) -> float | None:
        """Return the derivative along the normalized step of an objective; None if its gradient is 0."""
        gradient = self._gradient(rows, objective, parameters)
        norm = inner(gradient, gradient) ** 0.5
        return inner(reference, gradient) / norm if norm else None

    def _gradient(
        self, rows: Sequence[Mapping[str, Any]], objective: Objective, parameters: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        """Return the gradient of the mean loss of the rows, which are one batch."""
        self._model.zero_grad()
        batch = {
            name: value.to(self._accelerator.device) if isinstance(value, Tensor) else value
            for name, value in self._collator()(rows).items()
        }
        self._loss.score(self._model, batch, objective)[0].backward()
        return [parameter.grad for parameter in parameters]


def choose_halves(
    dataset: Sequence[Mapping[str, Any]], limit: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return two lists of random sequences, cut so that each list has at most `limit` tokens with padding.

    The probabilities of a causal model's first tokens do not depend on those that are cut off.
    """
    halves: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    open_halves = itertools.cycle((0, 1))
    for index in order:
        row = _cut(dataset[index], limit)
        if not _supervised(row):
            continue
        half = halves[next(open_halves)]
        longest = max(len(other["input_ids"]) for other in [*half, row])
        if len(half) == MAX_SEQUENCES or longest * (len(half) + 1) > limit:
            break
        half.append(row)
    return halves


def _cut(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return the first `limit` tokens of a row of one sequence."""
    names = [name for name in ("input_ids", "labels", "loss_weights", "base_logp") if name in row]
    return {name: np.array(row[name])[:limit] for name in names}


def _supervised(row: Mapping[str, Any]) -> int:
    """Return the number of supervised tokens of a row. The first token is never a target."""
    return int((np.array(row["labels"])[1:] != IGNORE_INDEX).sum())


def inner(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """Return the inner product of two gradients, in float32 or wider; None stands for zeros."""
    total = 0.0
    for left, right in zip(first, second, strict=True):
        if left is not None and right is not None:
            wide = torch.promote_types(left.dtype, torch.float32)
            total += torch.dot(left.flatten().to(wide), right.flatten().to(wide)).item()
    return total
