"""Statistics and gradients of single rows of logits, in plain torch.

`dft.loss.kernels` computes the same on a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dft.loss.dft import TokenStats, concatenate, times
from dft.loss.objectives import Dft, Objective, TokenRows, apply_floor

CACHED_BYTES = 4 * 2**20
"""Bytes of a tile that are processed at a time on a CPU, so that repeated passes over them hit the cache."""
GPU_BYTES = 256 * 2**20
"""Bytes of a tile that are processed at a time on a GPU. Each intermediate result takes this much memory."""


class LogitTransform(NamedTuple):
    """Transform from the output z of a model's head to its logits.

    The logits are softcap * tanh(scale * z / softcap), or scale * z if softcap is None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class RowOptions(NamedTuple):
    """Settings for scoring rows of the head's output z.

    Attributes:
        objective: gives the weight of each token.
        scale, softcap: the logits are softcap * tanh(scale * z / softcap), or scale * z if softcap is None.
    """

    objective: Objective = Dft()
    scale: float = 1.0
    softcap: float | None = None


class RowWeights(NamedTuple):
    """Lower bounds on the weights of rows, and factors from the data.

    Attributes:
        floor: (rows,) lower bounds on the weights of the objective, or None.
        loss: (rows,) weights that the data gives to the tokens, or None.
    """

    floor: Tensor | None = None
    loss: Tensor | None = None

    def rows(self, start: int, end: int) -> "RowWeights":
        """Return the weights of the rows from `start` to `end`."""
        return RowWeights(*(None if values is None else values[start:end] for values in self))

    def apply(self, weight: Tensor) -> Tensor:
        """Return the (rows,) weights of the tokens from those of the objective."""
        return times(apply_floor(weight, self.floor), self.loss)


NO_WEIGHTS = RowWeights()


def score_rows_torch(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    weights: RowWeights = NO_WEIGHTS,
    log_base: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Compute `dft.loss.tiles.score_rows` in plain torch, a few rows at a time."""
    rows, vocab = tile.shape
    step = max(1, (GPU_BYTES if tile.is_cuda else CACHED_BYTES) // (vocab * tile.itemsize))
    buffer = tile.new_empty(min(step, rows), vocab)
    parts = []
    for start in range(0, rows, step):
        block = slice(start, start + step)
        own = weights.rows(start, start + step)
        base = None if log_base is None else log_base[block]
        parts.append(_score_block(tile[block], targets[block], row_scale, options, buffer, own, base))
    return concatenate(parts), None if row_scale is None else tile


def _score_block(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    buffer: Tensor,
    weights: RowWeights,
    log_base: Tensor | None,
) -> TokenStats:
    """Return the statistics of a block of rows and overwrite its logits with their gradient."""
    if options.scale != 1:
        tile *= options.scale
    if options.softcap is not None:
        tile.div_(options.softcap).tanh_().mul_(options.softcap)
    target_column = targets[:, None]
    argmax = tile.argmax(1, keepdim=True)
    # Subtract the largest logit first: otherwise, if all logits are large, small differences between them
    # would be lost to rounding.
    top = tile.gather(1, argmax)
    tile -= top
    softmax = torch.softmax(tile, 1, out=buffer[: len(tile)])
    # The largest probability is at least 1 / vocab, so its logarithm is accurate where others may not be.
    log_total = -softmax.gather(1, argmax).log().squeeze(1)
    nll = log_total - tile.gather(1, target_column).squeeze(1)
    p_correct = torch.exp(-nll)
    entropy = log_total - _expectation(softmax, tile)
    objective = options.objective
    largest = tile.topk(min(objective.largest, tile.shape[1])).values if objective.largest else None
    weight = weights.apply(objective.weight(TokenRows(nll, p_correct, entropy, largest)))
    log_ratio, kl = None, torch.zeros_like(nll)
    if log_base is not None:
        log_ratio = log_base.neg_().add_(tile).sub_(log_total[:, None])  # log p - log base
        log_ratio.masked_fill_(softmax == 0, 0)  # both may be -inf there
        kl = _expectation(softmax, log_ratio)
    if row_scale is not None:
        target_factor = (weight * row_scale * options.scale)[:, None]
        factor = target_factor
        if log_ratio is not None:
            kl_scale = objective.kl_weight * row_scale * options.scale
            if weights.loss is not None:
                kl_scale = times(kl_scale.expand_as(kl), weights.loss)[:, None]
            factor = log_ratio.sub_(kl[:, None]).mul_(kl_scale).add_(target_factor)
        if options.softcap is None:
            torch.mul(softmax, factor, out=tile)
            tile.scatter_add_(1, target_column, -target_factor)
        else:
            softmax.mul_(factor).scatter_add_(1, target_column, -target_factor)
            tile.add_(top).div_(options.softcap).square_().neg_().add_(1).mul_(softmax)
    correct = argmax.squeeze(1) == targets
    return TokenStats(nll, p_correct, weight, correct, entropy, targets, kl, weights.loss)


def _expectation(softmax: Tensor, values: Tensor) -> Tensor:
    """Return the (rows,) sums of softmax * values, where 0 * -inf counts as 0."""
    sums = torch.bmm(softmax[:, None], values[:, :, None]).flatten()
    if sums.isnan().any():
        finite = values.clamp(min=torch.finfo(values.dtype).min)
        sums = torch.bmm(softmax[:, None], finite[:, :, None]).flatten()
    return sums
