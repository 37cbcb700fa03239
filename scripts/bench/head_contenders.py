"""Implementations of the loss head that scripts/bench/bench_head.py compares."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dft.labels import loss_positions
from dft.loss.dft import shifted_targets
from dft.loss.linear import linear_dft_loss
from dft.loss.objectives import OBJECTIVES, Dft, make_objective
from dft.loss.options import BaseHead


class Case(NamedTuple):
    """A shape, a dtype and a device. `share` is the share of supervised tokens."""

    tokens: int
    share: float
    width: int
    vocab: int
    dtype: str
    device: str

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden (1, N, D) and weight (V, D), which require gradients, and labels (1, N)."""
        torch.manual_seed(0)
        kind = {"dtype": getattr(torch, self.dtype), "device": self.device}
        hidden = torch.randn(1, self.tokens, self.width, **kind).requires_grad_()
        weight = torch.randn(self.vocab, self.width, **kind).mul_(self.width**-0.5).requires_grad_()
        labels = torch.randint(self.vocab, (1, self.tokens), device=self.device)
        # Evenly spread, so that the share is exact. The first position is never a target.
        unsupervised = torch.arange(self.tokens, device=self.device) * self.share % 1 >= self.share
        labels[:, unsupervised] = -100
        labels[:, 0] = -100
        return hidden, weight, labels


# Contenders compute the loss and its backward from (hidden, weight, labels), and return the loss.


def floor(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        rows = hidden.flatten(0, 1)[loss_positions(labels)]
        logits = rows @ weight.t()
        d_rows = logits @ weight
        weight.grad = logits.t() @ rows
        del d_rows


def floor_with_base(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        rows = hidden.flatten(0, 1)[loss_positions(labels)]
        base_logits = rows @ weight.t()
    floor(hidden, weight, labels)
    del base_logits


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss, _ = linear_dft_loss(hidden, weight, labels)
    loss.backward()
    return loss


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = full_forward(hidden, weight, labels)
    loss.backward()
    return loss


def full_forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss at all positions, with the steps and dtypes of the code published with the paper."""
    logits = F.linear(hidden, weight)[:, :-1].flatten(0, 1)
    following = labels[:, 1:].flatten()
    nll = F.cross_entropy(logits, following, reduction="none", ignore_index=-100)
    with torch.no_grad():
        targets = following.clamp(min=0)[:, None]
        p_correct = torch.softmax(logits, dim=-1).gather(1, targets).squeeze(1)
    keep = following != -100
    return (nll * p_correct * keep).sum() / keep.sum()


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = torch.compile(full_forward, dynamic=False)(hidden, weight, labels)
    loss.backward()
    return loss


def trl_loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("entropy", "is_top1")  # the metrics that SFTTrainer logs
    log_probs, *_ = ChunkedLogProbFunction.apply(
        rows, weight, None, targets.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    )
    keep = targets != -100
    return (-log_probs * log_probs.exp().detach() * keep).sum() / keep.sum()


def trl_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    keep, targets = shifted_targets(labels)
    loss = trl_loss(hidden[:, :-1][keep], weight, targets)
    loss.backward()
    return loss


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Score the positions that TRL scores: supervised rows on CUDA, every position on a CPU."""
    if hidden.is_cuda:
        return trl_rows(hidden, weight, labels)
    loss = trl_loss(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())
    loss.backward()
    return loss


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss(use_token_scaling=True, accum_dtype=torch.float32)
    loss = head(weight, hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss


def ours_with(name: str) -> "Contender":
    """Return `ours` with another objective, and with a base model of the same shape if it needs one."""
    objective = make_objective(name)

    def contender(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        base = BaseHead(hidden.detach(), weight.detach()) if objective.kl_weight else None
        scores = torch.full(labels.shape, -3.0, device=labels.device) if objective.needs_base_logp else None
        loss, _ = linear_dft_loss(hidden, weight, labels, objective=objective, base=base, base_logp=scores)
        loss.backward()
        return loss

    return contender


Contender = Callable[[Tensor, Tensor, Tensor], Tensor | None]
CONTENDERS: dict[str, Contender] = {
    "floor": floor,
    "ours": ours,
    "full": full,
    "compiled": compiled,
    "trl rows": trl_rows,
    "trl": trl,
    "liger": liger,
}
OTHER_OBJECTIVES: dict[str, Contender] = {name: ours_with(name) for name in OBJECTIVES if name != Dft.name}
CONTENDERS |= OTHER_OBJECTIVES | {"floor with base": floor_with_base}
NOT_COMPARED = (*OTHER_OBJECTIVES, "floor with base")
"""Contenders that run only if they are named; their losses are not compared with ours."""
