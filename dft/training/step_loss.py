"""Compute the loss of a micro-batch, through the fused head if the model supports it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dft.console import say
from dft.data.batches.collator import FlatCollator, PackedCollator, base_logp_of, loss_weights_of
from dft.errors import UserError
from dft.loss.dft import TokenStats, normalizer
from dft.loss.head import FusedHead, inspect_head, score_logits
from dft.loss.objectives import Objective
from dft.loss.options import BaseHead, LossOptions
from dft.training.attention.choice import runs_unpadded
from dft.training.batching import NON_MODEL_KEYS, Collator, check_isolation
from dft.training.memory.out_of_memory import MicroBatch
from dft.training.model.base_model import FrozenBaseModel
from dft.training.parallel.sequence_parallel import SequenceParallel
from dft.training.patches import masks_without_waiting


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch after its forward pass.

    Attributes:
        loss: scalar, this rank's contribution to the loss of the step.
        stats: statistics of its supervised tokens.
        outputs: the model's outputs.
        inputs: the part of the batch that this rank computes.
    """

    loss: Tensor
    stats: TokenStats
    outputs: Any
    inputs: Mapping[str, Any]


class StepLoss:
    """The DFT loss of micro-batches.

    Args:
        model: the model, not wrapped.
        device: device that it is trained on.
        dtype: its compute dtype.
        collator: returns the current collator, which a user may replace.
        fused_head: "auto" avoids computing logits where that is known to give the same loss; "on" requires
            it; "off" always computes them.
        unwrap: returns the model inside a wrapper.
        ranks: number of ranks, over which gradients are averaged.
        sequences: this rank's part in sequence parallelism; None without.
        router_coefficient: factor of the auxiliary loss of a mixture of experts that computes one.
        base_model: the frozen base model of an objective that needs one.
        end_of_turn_weight: minimum weight of a token that ends a turn; 0 for none.
        end_of_turn_ids: token ids that end a turn.
        announces: whether to print why there is no fused head.

    Attributes:
        head: the fused head, or the reason why there is none, or None before the model has been inspected.
        last_batch: the size of the last batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype,
        collator: Callable[[], Any],
        *,
        fused_head: str,
        unwrap: Callable[[nn.Module], nn.Module],
        ranks: int = 1,
        sequences: SequenceParallel | None = None,
        router_coefficient: float | None = None,
        base_model: FrozenBaseModel | None = None,
        end_of_turn_weight: float = 0.0,
        end_of_turn_ids: list[int] | None = None,
        announces: bool = True,
    ) -> None:
        self.last_batch = MicroBatch()
        self.head: FusedHead | str | None = None
        self._model = model
        self._device = device
        self._dtype = dtype
        self._collator = collator
        self._fused_head = fused_head
        self._unwrap = unwrap
        self._ranks = ranks
        self._sequences = sequences
        self._router_coefficient = router_coefficient
        self._base_model = base_model
        self._end_of_turn_weight = end_of_turn_weight
        self._announces = announces
        self._end_of_turn_ids = torch.tensor(end_of_turn_ids or [], dtype=torch.int64, device=device)
        self._printed: str | None = None
        self.forget_head()

    def train(
        self,
        forward: nn.Module,
        inputs: Mapping[str, Any],
        objective: Objective,
        num_items: Tensor | float | None,
        with_logits: bool = False,
    ) -> ScoredBatch:
        """Compute this rank's contribution to the loss of the optimizer step.

        DDP, FSDP and DeepSpeed average gradients over the ranks, while the loss is a sum over them: N is
        therefore divided by their number.

        Args:
            forward: see `score`, as the other arguments.
            num_items: number of supervised tokens in the whole step on all ranks; None for those of the
                batch.
        """
        if num_items is not None:
            if self._sequences is not None:
                num_items = num_items / self._sequences.size  # each rank counted the whole shared sequences
            num_items = num_items / self._ranks
        is_shared = False
        if self._sequences is not None and forward.training:
            is_shared, inputs = True, self._sequences.local_slice(inputs)
        loss, stats, outputs = self.score(forward, inputs, objective, num_items, is_shared, with_logits)
        return ScoredBatch(loss, stats, outputs, inputs)

    def score(
        self,
        forward: nn.Module,
        inputs: Mapping[str, Any],
        objective: Objective,
        num_items: Tensor | float | None = None,
        shifted: bool = False,
        with_logits: bool = False,
    ) -> tuple[Tensor, TokenStats, Any]:
        """Compute the loss of a batch.

        Args:
            forward: the model, possibly wrapped for training.
            inputs: the batch on the device, as the collator made it.
            objective: objective of the current optimizer step.
            num_items: divisor of the sum over the tokens; None for the number of supervised tokens in the
                batch.
            shifted: whether each label is the target of its own position.
            with_logits: whether the outputs must contain the logits.

        Returns:
            (loss, stats, outputs): a scalar, the statistics of the supervised tokens, the model's outputs.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"a batch has no 'labels', only {sorted(inputs)}; DFT learns from labeled tokens"
            )
        labels = inputs["labels"]
        self.last_batch = MicroBatch(len(labels), labels.numel(), is_training=torch.is_grad_enabled())
        features = {name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS}
        head = "the caller needs logits" if with_logits else self.inspect_head(forward)
        score = head.score if isinstance(head, FusedHead) else score_logits
        unpadded = runs_unpadded(self._model.config.get_text_config())
        with masks_without_waiting() if unpadded else nullcontext():
            options = LossOptions(
                objective=objective,
                num_items=num_items,
                min_weight=self._min_weight(labels),
                loss_weight=loss_weights_of(inputs),
                base_logp=base_logp_of(inputs),
                base=self._score_base(head, features) if objective.kl_weight else None,
                shifted=shifted,
                # A custom collator may change labels without updating the positions.
                positions=inputs.get("loss_positions") if isinstance(self._collator(), Collator) else None,
            )
            loss, stats, outputs = score(forward, features, labels, options)
        aux_loss = outputs.get("aux_loss")
        if aux_loss is not None and (forward.training or self._router_coefficient is not None):
            if self._router_coefficient is None:
                raise ValueError(
                    "the model returns an auxiliary loss, but its config.json has no coefficient for it; set "
                    "'output_router_logits' and 'router_aux_loss_coef', or let it return none"
                )
            # A mean over the tokens of the step like the rest of the loss, regardless of its micro-batches.
            share = stats.nll.numel() / normalizer(num_items, stats.nll)
            loss = loss + share * self._router_coefficient * aux_loss
        return loss, stats, outputs

    def _score_base(self, head: FusedHead | str, features: Mapping[str, Any]) -> BaseHead | Tensor | None:
        """Return what the loss needs of the base model; None without one."""
        if self._base_model is None:
            return None
        is_fused = isinstance(head, FusedHead)
        return self._base_model.head_input(features) if is_fused else self._base_model.logits(features)

    def gradient_addition(self) -> str | None:
        """Return what is added to the gradient besides the objective, as a reason; None if nothing is."""
        if self._router_coefficient is not None:
            return "the model adds a loss of its router to every objective"
        if self._end_of_turn_weight:
            return "--end_of_turn_weight changes the gradient of every objective; leave it out"
        return None

    def _min_weight(self, labels: Tensor) -> Tensor | None:
        """Return the (batch, seq) minimum weight of each label; None if there is none."""
        if not self._end_of_turn_weight:
            return None
        return self._end_of_turn_weight * torch.isin(labels, self._end_of_turn_ids).float()

    def inspect_model(self, model: PreTrainedModel, forward: nn.Module) -> None:
        """Run the model checks that are required before the first step. All ranks must call it.

        Args:
            model: the model, possibly wrapped by FSDP.
            forward: the model, possibly wrapped for training.

        Raises:
            UserError: the model does not keep packed conversations separate, or has no fused head although
                one is required.
        """
        self._model = model
        if isinstance(collator := self._collator(), PackedCollator | FlatCollator):
            with evaluating(forward):
                check_isolation(forward, model, collator, self._device, self._dtype)
        self.forget_head()
        self.inspect_head(forward)

    def forget_head(self) -> None:
        """Schedule a new inspection, because the model may have received an adapter or new tokens."""
        self.head = "it is switched off" if self._fused_head == "off" else None

    def inspect_head(self, forward: Any) -> FusedHead | str:
        """Return the fused head, or the reason for computing logits. All ranks must call it."""
        if self.head is None:
            with evaluating(forward):
                self.head = inspect_head(self._unwrap(forward), forward, self._probe(), self._dtype)
            if isinstance(self.head, str):
                if self._fused_head == "on":
                    raise UserError(f"--fused_head on: {self.head}; use --fused_head auto")
                if self._announces and self.head != self._printed:
                    say(f"note        the loss is computed from whole logits: {self.head}")
                self._printed = self.head
        return self.head

    def _probe(self) -> dict[str, Any]:
        """Return a small batch as the model gets it. Does not consume random numbers."""
        vocab = self._model.config.get_text_config().vocab_size
        ids = np.arange(16).reshape(2, 8) * 7919 % vocab
        collator = self._collator()
        if not isinstance(collator, Collator):
            return {"input_ids": torch.tensor(ids, device=self._device)}
        batch = collator([{"input_ids": row, "labels": row} for row in ids])
        return {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in NON_MODEL_KEYS
        }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and restore its mode afterwards.

    Compiled code does not run in this context: the small batches of checks would be compiled separately.
    """
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)
