"""Options of the loss, passed through the package as one value."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dft.loss.objectives import Dft, Objective, check_base, check_base_logp


class BaseHead(NamedTuple):
    """Input and weights of the output head of a frozen base model, detached.

    The logits are computed with the same scale and soft cap as those of the trained model.

    Attributes:
        hidden: (batch, seq, base hidden).
        weight: (vocab, base hidden).
        bias: (vocab,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LossOptions:
    """Everything except the model's output and the labels that determines the loss of a batch.

    Attributes:
        objective: gives the weight w_t of each token.
        num_items: N, the number of supervised tokens of the whole optimizer step (all micro-batches, all
            ranks), a number or a scalar tensor. Default: the supervised tokens of the batch.
        min_weight: (batch, seq), aligned with the labels: lower bound on the weight of each token.
        loss_weight: (batch, seq), aligned with the labels, at least 0: factor on everything that each token
            adds to the loss. It does not change N.
        base_logp: (batch, seq), aligned with the labels: log-probability of each label under the untrained
            model in nats, in float32 or wider, for an objective that `needs_base_logp`. Others ignore it.
        base: the frozen base model's output for an objective with a `kl_weight`: its logits
            (batch, seq, vocab) where the loss is computed from logits, its `BaseHead` where it is fused.
        shifted: whether position t predicts labels[:, t] instead of labels[:, t + 1]. Used where sequences
            are split between ranks.
        positions: (tokens,) int64, the flat positions b * seq + t that predict a supervised token, in
            ascending order (see `dft.labels.loss_positions`). Only the fused loss uses them; passing them
            saves it one synchronization with the device.

    Raises:
        ValueError: `base` is missing although the objective needs it, or set although it does not; or
            `base_logp` is missing.
    """

    objective: Objective = Dft()
    num_items: Tensor | float | None = None
    min_weight: Tensor | None = None
    loss_weight: Tensor | None = None
    base_logp: Tensor | None = None
    base: Tensor | BaseHead | None = None
    shifted: bool = False
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        check_base(self.objective, self.base is not None)
        check_base_logp(self.objective, self.base_logp)
