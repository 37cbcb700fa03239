"""From a tile of logits to the statistics of its rows and their gradient, row by row."""

from typing import NamedTuple

import torch
from torch import Tensor

from dft.loss.dft import TokenStats
from dft.loss.objectives import Dft, Objective, Rows, lifted

CACHED_BYTES = 4 * 2**20
"""Of a tile that plain torch works on at a time, so that its passes read from the cache."""
GPU_BYTES = 256 * 2**20
"""The same on a GPU, which wants much at a time; it is what each intermediate result takes."""


class RowOptions(NamedTuple):
    """What is done with the head's output z, and how tokens are weighted.

    Attributes:
        objective: says what a token weighs.
        scale, softcap: logits are softcap * tanh(scale * z / softcap), or scale * z where softcap is None.
    """

    objective: Objective = Dft()
    scale: float = 1.0
    softcap: float | None = None


def score_rows_torch(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    min_weight: Tensor | None = None,
    log_base: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """`score_rows` in plain torch, a few rows at a time."""
    rows, vocab = tile.shape
    step = max(1, (GPU_BYTES if tile.is_cuda else CACHED_BYTES) // (vocab * tile.itemsize))
    space = tile.new_empty(min(step, rows), vocab)
    parts = []
    for start in range(0, rows, step):
        some = slice(start, start + step)
        floor, base = (None if one is None else one[some] for one in (min_weight, log_base))
        parts.append(_score_some(tile[some], targets[some], row_scale, options, space, floor, base))
    stats = TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return stats, None if row_scale is None else tile


def _score_some(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    space: Tensor,
    min_weight: Tensor | None,
    log_base: Tensor | None,
) -> TokenStats:
    """Statistics of some rows, whose logits make room for their gradient."""
    if options.scale != 1:
        tile *= options.scale
    if options.softcap is not None:
        tile.div_(options.softcap).tanh_().mul_(options.softcap)
    at = targets[:, None]
    best = tile.argmax(1, keepdim=True)
    # From here on logits are counted from the greatest: what is small is subtracted before it is rounded at
    # the size of the logits, which may all be large.
    top = tile.gather(1, best)
    tile -= top
    softmax = torch.softmax(tile, 1, out=space[: len(tile)])
    # The greatest probability is at least 1 / vocab, so its logarithm is exact where those of others are not.
    log_total = -softmax.gather(1, best).log().squeeze(1)
    nll = log_total - tile.gather(1, at).squeeze(1)
    p_correct = torch.exp(-nll)
    entropy = log_total - _expectation(softmax, tile)
    objective = options.objective
    largest = tile.topk(min(objective.largest, tile.shape[1])).values if objective.largest else None
    weight = lifted(objective.weight(Rows(nll, p_correct, entropy, largest)), min_weight)
    gap, kl = None, torch.zeros_like(nll)
    if log_base is not None:
        gap = log_base.neg_().add_(tile).sub_(log_total[:, None])  # log p - log base
        gap.masked_fill_(softmax == 0, 0)  # where both are -inf, as of tokens that are none
        kl = _expectation(softmax, gap)
    if row_scale is not None:
        factor = (weight * row_scale * options.scale)[:, None]
        pull = factor  # towards the target; and with a base, away from where the model exceeds it
        if gap is not None:
            pull = gap.sub_(kl[:, None]).mul_(objective.kl_weight * row_scale * options.scale).add_(factor)
        if options.softcap is None:
            torch.mul(softmax, pull, out=tile)
            tile.scatter_add_(1, at, -factor)
        else:
            softmax.mul_(pull).scatter_add_(1, at, -factor)
            tile.add_(top).div_(options.softcap).square_().neg_().add_(1).mul_(softmax)
    return TokenStats(nll, p_correct, weight, best.squeeze(1) == targets, entropy, targets, kl)


def _expectation(softmax: Tensor, logits: Tensor) -> Tensor:
    """(rows,) sum of softmax * logits, where a logit of -inf adds nothing."""
    found = torch.bmm(softmax[:, None], logits[:, :, None]).flatten()
    if found.isnan().any():
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        found = torch.bmm(softmax[:, None], finite[:, :, None]).flatten()
    return found
