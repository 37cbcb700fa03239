"""The definition of the loss: Dynamic Fine-Tuning (DFT, Wu et al., arXiv 2508.05629, Eq. 9) and its kin."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dft.labels import IGNORE_INDEX
from dft.loss.objectives import Dft, Objective, Rows, lifted


class TokenStats(NamedTuple):
    """What one batch says about each of its supervised tokens, in reading order, detached.

    Attributes:
        nll: (tokens,) negative log-likelihood of the target, in nats.
        p_correct: (tokens,) probability of the target, exp(-nll).
        weight: (tokens,) of the objective; for DFT alpha * p_correct + (1 - alpha).
        correct: (tokens,) bool, whether the target is the argmax.
        entropy: (tokens,) of the model's distribution, in nats.
        target: (tokens,) int64, the token that was to be predicted.
        kl: (tokens,) KL(model || base) in nats, 0 where no base is given.
    """

    nll: Tensor
    p_correct: Tensor
    weight: Tensor
    correct: Tensor
    entropy: Tensor
    target: Tensor
    kl: Tensor


def dft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = None,
    objective: Objective | None = None,
    num_items: Tensor | float | None = None,
    min_weight: Tensor | None = None,
    base_logits: Tensor | None = None,
    shifted: bool = False,
) -> tuple[Tensor, TokenStats]:
    """Cross-entropy of every supervised token, weighted by the model's own detached probability of it.

        loss = sum_t w_t * nll_t / N        w_t = stop_gradient(alpha * p_t + (1 - alpha)),  p_t = exp(-nll_t)

    alpha = 1 is Eq. 9 of the paper, alpha = 0 is supervised fine-tuning. The gradient on the logits is
    w_t * (softmax - onehot) / N; at alpha = 1 that is the gradient of -sum_t p_t / N.

    Args:
        logits: (batch, seq, vocab), any floating dtype; computed in float32 or wider.
        labels: (batch, seq), not shifted: logits[:, t] predicts labels[:, t + 1]. Unsupervised: -100.
        alpha: share of the dynamic weight, in [0, 1]; by default 1.
        objective: in place of alpha, another rule for w_t, see `dft.loss.objectives`.
        num_items: N, the supervised tokens of the whole optimizer step (all micro-batches, all ranks).
            Default: those of this batch.
        min_weight: (batch, seq), beside the labels: no token weighs less.
        base_logits: (batch, seq, vocab) of the frozen base model, for an objective with a `kl_weight`, which
            adds kl_weight * sum_t KL(model || base)_t / N.
        shifted: whether logits[:, t] predicts labels[:, t], as where sequences are cut up between ranks.

    Returns:
        (loss, stats): a scalar attached to the graph, also when no token is supervised (then it is 0 and its
        gradient is 0), and the statistics of the supervised tokens.

    Raises:
        ValueError: shapes that do not fit, alpha outside [0, 1] or beside an objective, a base that is
            missing or has no use.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be (batch, seq, vocab) and labels (batch, seq), got {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}"
        )
    chosen = chosen_objective(alpha, objective, base_logits is not None)
    keep, targets = targets_here(labels) if shifted else shifted_targets(labels)
    rows = logits[:, : keep.shape[1]][keep]  # (tokens, vocab)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    log_probs = F.log_softmax(rows, dim=-1)
    nll = F.nll_loss(log_probs, targets, reduction="none")  # (tokens,)
    p_correct = torch.exp(-nll.detach())
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        correct = rows.argmax(-1) == targets
        largest = rows.topk(min(chosen.largest, rows.shape[-1])).values if chosen.largest else None
        weight = chosen.weight(Rows(nll.detach(), p_correct, entropy, largest))
        weight = lifted(weight, beside(min_weight, labels, keep, shifted))
    total = (weight * nll).sum()
    kl = torch.zeros_like(p_correct)
    if base_logits is not None:
        base = base_logits.detach()[:, : keep.shape[1]][keep].to(rows.dtype)
        gap = log_probs - F.log_softmax(base, dim=-1)
        probs = log_probs.exp()
        kl = (probs * gap.masked_fill(probs == 0, 0)).sum(-1)  # 0 log 0 is 0
        total = total + chosen.kl_weight * kl.sum()
    loss = total / normalizer(num_items, targets)
    return loss, TokenStats(nll.detach(), p_correct, weight, correct, entropy, targets, kl.detach())


def chosen_objective(alpha: float | None, objective: Objective | None, has_base: bool) -> Objective:
    """DFT at some alpha, or another objective. Raises ValueError for both, and for one that has no base."""
    if objective is None:
        objective = Dft() if alpha is None else Dft(alpha)
    elif alpha is not None:
        raise ValueError(f"alpha {alpha} and the objective {objective} each say how tokens weigh; give one")
    if has_base != (objective.kl_weight > 0):
        lack = "has no use for" if has_base else "needs the logits or hidden states of"
        raise ValueError(f"{objective} {lack} a base model")
    return objective


def beside(values: Tensor | None, labels: Tensor, keep: Tensor, shifted: bool) -> Tensor | None:
    """(tokens,) of what stands beside the labels, (batch, seq), where they are supervised."""
    if values is None:
        return None
    if values.shape != labels.shape:
        raise ValueError(
            f"min_weight must be (batch, seq) as the labels, got {tuple(values.shape)} and "
            f"{tuple(labels.shape)}"
        )
    return (values if shifted else values[:, 1:])[keep]


def shifted_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions predict a supervised token, and which token.

    Args:
        labels: (batch, seq), not shifted.

    Returns:
        keep: (batch, seq - 1) bool. targets: (tokens,) the labels at `keep`, one position further on.
    """
    following = labels[:, 1:]
    keep = following != IGNORE_INDEX
    return keep, following[keep]


def targets_here(labels: Tensor) -> tuple[Tensor, Tensor]:
    """`shifted_targets` of labels that stand where they are predicted; keep is (batch, seq)."""
    keep = labels != IGNORE_INDEX
    return keep, labels[keep]


def normalizer(num_items: Tensor | float | None, targets: Tensor) -> Tensor | float:
    """N, or 1 if that is 0: a step without supervised tokens has loss 0, not 0 / 0."""
    count = targets.numel() if num_items is None else num_items
    return count + (count == 0)
