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
CHUNK = 32
"""Number of logits of which only the largest is compared at first where the largest of a row are selected."""


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
    """Inputs of the weights of rows other than the logits.

    Attributes:
        floor: (rows,) lower bounds on the weights of the objective, or None.
        loss: (rows,) weights that the data gives to the tokens, or None.
        base_logp: (rows,) log-probabilities of the targets under the untrained model; None unless the
            objective `needs_base_logp`.
    """

    floor: Tensor | None = None
    loss: Tensor | None = None
    base_logp: Tensor | None = None

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
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Compute `dft.loss.tiles.score_rows` in plain torch, a few rows at a time."""
    rows, vocab = tile.shape
    step = max(1, (GPU_BYTES if tile.is_cuda else CACHED_BYTES) // (vocab * tile.itemsize))
    scratch = tile.new_empty(2, min(step, rows), vocab)
    gradient = None if row_scale is None else tile if out is None else out
    parts = []
    for start in range(0, rows, step):
        block = slice(start, start + step)
        own = weights.rows(start, start + step)
        softmax, spare = scratch[:, : len(tile[block])]
        row = _Rows(tile[block], targets[block], options, softmax, spare)
        stats, log_ratio = row.score(own, None if base is None else base[block])
        if row_scale is not None and gradient is not None:
            row.write_gradient(gradient[block], stats, row_scale, log_ratio)
        parts.append(stats)
    return concatenate(parts), gradient


class _Rows:
    """A few rows of logits and what is computed from them.

    Args:
        tile: (rows, vocab) output of the head, overwritten.
        softmax, spare: (rows, vocab) memory for the probabilities and for intermediate results.
    """

    def __init__(
        self, tile: Tensor, targets: Tensor, options: RowOptions, softmax: Tensor, spare: Tensor
    ) -> None:
        self.tile, self.targets, self.options, self.spare = tile, targets, options, spare
        transform_(tile, options)
        self.top = tile.amax(1, keepdim=True)
        self.correct = _first_largest(tile, targets, self.top)
        # Subtract the largest logit first: otherwise, if all logits are large, small differences between
        # them would be lost to rounding.
        tile -= self.top
        self.softmax = torch.softmax(tile, 1, out=softmax)
        # The largest probability is at least 1 / vocab, so its logarithm is accurate where others may not be.
        self.log_total = -softmax.amax(1).log()

    def score(self, weights: RowWeights, base: Tensor | None) -> tuple[TokenStats, Tensor | None]:
        """Return the statistics, and (rows, vocab) log-ratios of model and base, which overwrite `base`."""
        tile, objective = self.tile, self.options.objective
        nll = self.log_total - tile.gather(1, self.targets[:, None]).squeeze(1)
        p_correct = torch.exp(-nll)
        entropy = self.log_total - _expectation(self.softmax, tile, self.spare)
        largest = largest_values(tile, objective.largest) if objective.largest else None
        collision = (
            torch.linalg.vector_norm(self.softmax, dim=1).square() if objective.needs_collision else None
        )
        statistics = TokenRows(nll, p_correct, entropy, largest, weights.base_logp, collision)
        weight = weights.apply(objective.weight(statistics))
        kl = torch.zeros_like(nll) if base is None else self._divergence(base)
        stats = TokenStats(nll, p_correct, weight, self.correct, entropy, self.targets, kl, weights.loss)
        return stats, base

    def _divergence(self, base: Tensor) -> Tensor:
        """Return the (rows,) divergences from the base model, and overwrite `base` with the log-ratios."""
        transform_(base, self.options)
        base -= base.amax(1, keepdim=True)
        base_total = torch.exp(base, out=self.spare).sum(1).log()
        torch.sub(self.tile, base, out=base).sub_((self.log_total - base_total)[:, None])
        kl = torch.mul(self.softmax, base, out=self.spare).sum(1)
        if kl.isnan().any():  # logits of -inf, where the log-ratio may be inf or NaN
            base.masked_fill_(self.softmax == 0, 0)
            kl = torch.mul(self.softmax, base, out=self.spare).sum(1)
        return kl

    def write_gradient(
        self, out: Tensor, stats: TokenStats, row_scale: Tensor, log_ratio: Tensor | None
    ) -> None:
        """Write the gradient of the loss on the head's output to `out`, which may be the tile."""
        options, softmax, target_column = self.options, self.softmax, self.targets[:, None]
        target_factor = (stats.weight * row_scale * options.scale)[:, None]
        factor = target_factor
        if log_ratio is not None:
            kl_scale = options.objective.kl_weight * row_scale * options.scale
            if stats.loss_weight is not None:
                kl_scale = times(kl_scale.expand_as(stats.kl), stats.loss_weight)[:, None]
            factor = log_ratio.mul_(kl_scale).add_(target_factor - kl_scale * stats.kl[:, None])
        # In the tile's dtype first: a product that converts to half precision is ten times slower.
        wide = out if out.dtype == softmax.dtype else self.spare
        if options.softcap is None:
            torch.mul(softmax, factor, out=wide).scatter_add_(1, target_column, -target_factor)
        else:
            softmax.mul_(factor).scatter_add_(1, target_column, -target_factor)
            slope = self.tile.add_(self.top).div_(options.softcap).square_().neg_().add_(1)
            torch.mul(slope, softmax, out=wide)
        if wide is not out:
            out.copy_(wide)


def transform_(z: Tensor, options: RowOptions) -> None:
    """Overwrite the output of a head with its logits."""
    if options.scale != 1:
        z *= options.scale
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)


def largest_values(tile: Tensor, count: int) -> Tensor:
    """Return the largest values of each row in descending order, (rows, count), or all if there are fewer.

    They are among the columns of the chunks with the largest maxima, so only these are sorted.
    """
    vocab = tile.shape[1]
    chunks = vocab // CHUNK
    if chunks <= 2 * count:
        return tile.topk(min(count, vocab)).values
    chunked = tile[:, : chunks * CHUNK].unflatten(1, (CHUNK, chunks))
    columns = chunked.amax(1).topk(count).indices
    candidates = chunked.gather(2, columns[:, None].expand(-1, CHUNK, -1)).flatten(1)
    return torch.cat([candidates, tile[:, chunks * CHUNK :]], 1).topk(count).values


def _first_largest(tile: Tensor, targets: Tensor, top: Tensor) -> Tensor:
    """Return whether the targets are the argmax of their rows, the first of equal logits, (rows,)."""
    if tile.device.type != "cpu":
        return tile.argmax(1) == targets
    # The argmax of a CPU is not vectorized.
    largest = (tile.gather(1, targets[:, None]) == top).squeeze(1)
    for row in largest.nonzero().flatten().tolist():
        before = tile[row, : int(targets[row])]
        largest[row] = not len(before) or bool(before.amax() < top[row, 0])
    return largest


def _expectation(softmax: Tensor, values: Tensor, spare: Tensor) -> Tensor:
    """Return the (rows,) sums of softmax * values, where 0 * -inf counts as 0.

    Args:
        spare: (rows, vocab) memory for the products.
    """
    sums = torch.mul(softmax, values, out=spare).sum(1)
    if sums.isnan().any():
        finite = values.clamp(min=torch.finfo(values.dtype).min)
        sums = torch.mul(softmax, finite, out=spare).sum(1)
    return sums
