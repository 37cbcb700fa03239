"""The definition of the DFT loss (Dynamic Fine-Tuning, Wu et al., arXiv 2508.05629, Eq. 9)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dft.labels import IGNORE_INDEX


class TokenStats(NamedTuple):
    """What one batch says about each of its supervised tokens, in reading order, detached.

    Attributes:
        nll: (tokens,) negative log-likelihood of the target, in nats.
        p_correct: (tokens,) probability of the target, exp(-nll).
        weight: (tokens,) the DFT weight alpha * p_correct + (1 - alpha).
        correct: (tokens,) bool, whether the target is the argmax.
        entropy: (tokens,) of the model's distribution, in nats.
        target: (tokens,) int64, the token that was to be predicted.
    """

    nll: Tensor
    p_correct: Tensor
    weight: Tensor
    correct: Tensor
    entropy: Tensor
    target: Tensor


def dft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    num_items: Tensor | float | None = None,
    shifted: bool = False,
) -> tuple[Tensor, TokenStats]:
    """Cross-entropy of every supervised token, weighted by the model's own detached probability of it.

        loss = sum_t w_t * nll_t / N        w_t = stop_gradient(alpha * p_t + (1 - alpha)),  p_t = exp(-nll_t)

    alpha = 1 is Eq. 9 of the paper, alpha = 0 is supervised fine-tuning. The gradient on the logits is
    w_t * (softmax - onehot) / N; at alpha = 1 that is the gradient of -sum_t p_t / N.

    Args:
        logits: (batch, seq, vocab), any floating dtype; computed in float32 or wider.
        labels: (batch, seq), not shifted: logits[:, t] predicts labels[:, t + 1]. Unsupervised: -100.
        alpha: share of the dynamic weight, in [0, 1].
        num_items: N, the supervised tokens of the whole optimizer step (all micro-batches, all ranks).
            Default: those of this batch.
        shifted: whether logits[:, t] predicts labels[:, t], as where sequences are cut up between ranks.

    Returns:
        (loss, stats): a scalar attached to the graph, also when no token is supervised (then it is 0 and its
        gradient is 0), and the statistics of the supervised tokens.

    Raises:
        ValueError: shapes that do not fit, or alpha outside [0, 1].
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be (batch, seq, vocab) and labels (batch, seq), got {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}"
        )
    check_alpha(alpha)
    keep, targets = targets_here(labels) if shifted else shifted_targets(labels)
    rows = logits[:, : keep.shape[1]][keep]  # (tokens, vocab)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    log_probs = F.log_softmax(rows, dim=-1)
    nll = F.nll_loss(log_probs, targets, reduction="none")  # (tokens,)
    p_correct = torch.exp(-nll.detach())
    weight = alpha * p_correct + (1 - alpha)
    loss = (weight * nll).sum() / normalizer(num_items, targets)
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        correct = rows.argmax(-1) == targets
    return loss, TokenStats(nll.detach(), p_correct, weight, correct, entropy, targets)


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] (0 is SFT, 1 is the paper's DFT), got {alpha}")


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
