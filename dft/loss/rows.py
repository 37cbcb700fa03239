"""From a tile of logits to the statistics of its rows and their gradient, row by row."""

from typing import NamedTuple

import torch
from torch import Tensor

from dft.loss.dft import TokenStats


class Shape(NamedTuple):
    """What is done with the head's output, and how tokens are weighted.

    Attributes:
        alpha: the weight of a token is alpha * p + (1 - alpha).
        scale, softcap: logits are softcap * tanh(scale * z / softcap), or scale * z where softcap is None.
    """

    alpha: float = 1.0
    scale: float = 1.0
    softcap: float | None = None


def score_rows(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    shape: Shape,
    dtype: torch.dtype,
    space: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of rows of a head's output, and the gradient of `row_scale * sum(w * nll)` on it.

    Args:
        tile: (rows, vocab), float32 or wider. It is overwritten.
        targets: (rows,) int64.
        row_scale: scalar; None for statistics alone.
        dtype: in which the gradient goes on; that of the tile, or half precision.
        space: (at least rows, vocab) memory to use on a CPU.

    Returns:
        stats: (rows,) each, in the tile's dtype. gradient: (rows, vocab), or None. On a CPU it is in the
        tile's dtype, since products that sum in float32 want it there.
    """
    if tile.is_cuda:
        from dft.loss.kernels import score_rows as score_rows_triton  # triton comes with CUDA builds of torch

        return score_rows_triton(tile, targets, row_scale, shape, dtype)
    return score_rows_torch(tile, targets, row_scale, shape, space)


def score_rows_torch(
    tile: Tensor, targets: Tensor, row_scale: Tensor | None, shape: Shape, space: Tensor | None = None
) -> tuple[TokenStats, Tensor | None]:
    """`score_rows` in plain torch. Each operation that is left out here is a pass over the tile saved."""
    if shape.scale != 1:
        tile *= shape.scale
    if shape.softcap is not None:
        tile.div_(shape.softcap).tanh_().mul_(shape.softcap)
    at = targets[:, None]
    target_logits = tile.gather(1, at).squeeze(1)
    best = tile.argmax(1)
    softmax = torch.softmax(tile, 1, out=None if space is None else space[: len(tile)])
    # The greatest probability is at least 1 / vocab, so its logarithm is exact where those of others are not.
    top = best[:, None]
    log_sum = (tile.gather(1, top) - softmax.gather(1, top).log()).squeeze(1)
    nll = log_sum - target_logits
    p_correct = torch.exp(-nll)
    weight = shape.alpha * p_correct + (1 - shape.alpha)
    entropy = log_sum - expectation(softmax, tile)
    stats = TokenStats(nll, p_correct, weight, best == targets, entropy)
    if row_scale is None:
        return stats, None
    factor = weight * row_scale  # (rows,)
    gradient = softmax.mul_(factor[:, None])
    gradient.scatter_add_(1, at, -factor[:, None])
    if shape.softcap is not None:
        gradient *= tile.div_(shape.softcap).square_().neg_().add_(1)
    if shape.scale != 1:
        gradient *= shape.scale
    return stats, gradient


def expectation(softmax: Tensor, logits: Tensor) -> Tensor:
    """(rows,) sum of softmax * logits, where a logit of -inf adds nothing."""
    found = torch.bmm(softmax[:, None], logits[:, :, None]).flatten()
    if found.isnan().any():
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        found = torch.bmm(softmax[:, None], finite[:, :, None]).flatten()
    return found
