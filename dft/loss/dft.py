"""Definition of the loss: Dynamic Fine-Tuning (DFT, Wu et al., arXiv 2508.05629, Eq. 9) and its variants."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dft.labels import IGNORE_INDEX
from dft.loss.objectives import Objective, TokenRows, apply_floor, check_base_logp, resolve_objective


class TokenStats(NamedTuple):
    """Statistics of each supervised token of a batch, in reading order, detached.

    Attributes:
        nll: (tokens,) negative log-likelihood of the target, in nats.
        p_correct: (tokens,) probability of the target, exp(-nll).
        weight: (tokens,) of the objective, for DFT alpha * p_correct + (1 - alpha), times `loss_weight`.
        correct: (tokens,) bool, whether the target is the argmax.
        entropy: (tokens,) of the model's distribution, in nats.
        target: (tokens,) int64, the token to predict.
        kl: (tokens,) KL(model || base) in nats, 0 without a base model.
        loss_weight: (tokens,) weight that the data gives to the token; None if it gives none.
    """

    nll: Tensor
    p_correct: Tensor
    weight: Tensor
    correct: Tensor
    entropy: Tensor
    target: Tensor
    kl: Tensor
    loss_weight: Tensor | None = None


def dft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = None,
    objective: Objective | None = None,
    num_items: Tensor | float | None = None,
    min_weight: Tensor | None = None,
    loss_weight: Tensor | None = None,
    base_logits: Tensor | None = None,
    base_logp: Tensor | None = None,
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
        objective: another rule for w_t instead of alpha, see `dft.loss.objectives`.
        num_items: N, the supervised tokens of the whole optimizer step, on all ranks. Default: of this batch.
        min_weight: (batch, seq), aligned with the labels: lower bound on the weight of each token.
        loss_weight: (batch, seq), like it: factor on all that each token adds to the loss; N counts tokens.
        base_logits: (batch, seq, vocab) of the base model: adds kl_weight * sum_t KL(model || base)_t / N.
        base_logp: (batch, seq), like them: log p under the untrained model, if the objective needs it.
        shifted: whether logits[:, t] predicts labels[:, t], as where sequences are split between ranks.

    Returns:
        (loss, stats): a scalar attached to the graph, even if no token is supervised (it and its gradient are
        then 0), and the statistics of the supervised tokens.

    Raises:
        ValueError: wrong shapes, alpha out of range or beside an objective, a base missing or not used.
    """
    _check_shapes(logits, labels, min_weight=min_weight, loss_weight=loss_weight, base_logp=base_logp)
    objective = resolve_objective(alpha, objective, base_logits is not None)
    keep, targets = aligned_targets(labels) if shifted else shifted_targets(labels)
    min_weight, loss_weight = (_of_targets(values, keep) for values in (min_weight, loss_weight))
    rows = logits[:, : keep.shape[1]][keep]  # (tokens, vocab)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    log_probs = F.log_softmax(rows, dim=-1)
    nll = F.nll_loss(log_probs, targets, reduction="none")  # (tokens,)
    with torch.no_grad():
        tokens = _token_rows(rows, log_probs, nll, objective, _base_logp(base_logp, keep, objective))
        correct = rows.argmax(-1) == targets
        weight = times(apply_floor(objective.weight(tokens), min_weight), loss_weight)
    total, kl = (weight * nll).sum(), torch.zeros_like(tokens.nll)
    if base_logits is not None:
        kl = _kl(log_probs, base_logits.detach()[:, : keep.shape[1]][keep])
        total = total + objective.kl_weight * times(kl, loss_weight).sum()
    stats = (tokens.nll, tokens.p_correct, weight, correct, tokens.entropy, targets, kl.detach(), loss_weight)
    return total / normalizer(num_items, targets), TokenStats(*stats)


def _check_shapes(logits: Tensor, labels: Tensor, **values: Tensor | None) -> None:
    """Raise ValueError unless there is one row of logits per label, and one of the values where given."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be (batch, seq, vocab) and labels (batch, seq), got {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}"
        )
    for name, tensor in values.items():
        check_aligned(name, tensor, labels)


def _of_targets(values: Tensor | None, keep: Tensor) -> Tensor | None:
    """Return the (tokens,) values of the supervised tokens, given one value per label or none."""
    return None if values is None else values[:, values.shape[1] - keep.shape[1] :][keep]


def _base_logp(base_logp: Tensor | None, keep: Tensor, objective: Objective) -> Tensor | None:
    """Return the (tokens,) scores of the untrained model if the objective uses them; else None."""
    check_base_logp(objective, base_logp)
    return _of_targets(base_logp, keep) if objective.needs_base_logp else None


def check_aligned(name: str, values: Tensor | None, labels: Tensor) -> None:
    """Raise ValueError unless there is one value per label, or none at all."""
    if values is not None and values.shape != labels.shape:
        shapes = f"{tuple(values.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{name} must be (batch, seq) like the labels, got {shapes}")


def times(values: Tensor, loss_weight: Tensor | None) -> Tensor:
    """Return the (tokens,) values, multiplied by the weights of the tokens if there are any."""
    return values if loss_weight is None else values * loss_weight.to(values.dtype)


def concatenate(parts: Sequence[TokenStats]) -> TokenStats:
    """Return the statistics of all parts, at least one, as one."""
    columns = [torch.cat(column) for column in zip(*(part[:-1] for part in parts), strict=True)]
    weights = [part.loss_weight for part in parts if part.loss_weight is not None]
    return TokenStats(*columns)._replace(loss_weight=torch.cat(weights) if weights else None)


def _token_rows(
    rows: Tensor, log_probs: Tensor, nll: Tensor, objective: Objective, base_logp: Tensor | None
) -> TokenRows:
    """Return what an objective computes weights from, given (tokens, vocab) logits and log-probabilities."""
    probs = log_probs.exp()
    return TokenRows(
        nll=nll.detach(),
        p_correct=torch.exp(-nll.detach()),
        entropy=torch.special.entr(probs).sum(-1),
        top_logits=rows.topk(min(objective.largest, rows.shape[-1])).values if objective.largest else None,
        base_logp=base_logp,
        collision=probs.square().sum(-1) if objective.needs_collision else None,
    )


def _kl(log_probs: Tensor, base_rows: Tensor) -> Tensor:
    """Return KL(model || base) in nats, (tokens,), from log-probabilities and the base model's logits."""
    log_ratio = log_probs - F.log_softmax(base_rows.to(log_probs.dtype), dim=-1)
    probs = log_probs.exp()
    return (probs * log_ratio.masked_fill(probs == 0, 0)).sum(-1)  # 0 log 0 is 0


def shifted_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask of the positions that predict a supervised token, and these tokens.

    Args:
        labels: (batch, seq), not shifted: position t predicts labels[:, t + 1].

    Returns:
        keep: (batch, seq - 1) bool, the predicting positions. targets: (tokens,) the labels they predict.
    """
    following = labels[:, 1:]
    keep = following != IGNORE_INDEX
    return keep, following[keep]


def aligned_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return `shifted_targets`, (batch, seq) and (tokens,), if position t predicts labels[:, t]."""
    keep = labels != IGNORE_INDEX
    return keep, labels[keep]


def normalizer(num_items: Tensor | float | None, targets: Tensor) -> Tensor | float:
    """Return N, or 1 if N is 0: a step without supervised tokens has loss 0 instead of 0 / 0."""
    count = targets.numel() if num_items is None else num_items
    return count + (count == 0)
