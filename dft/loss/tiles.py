"""Compute token statistics and gradients of the loss from hidden states, tile by tile."""

from typing import NamedTuple

import torch
from torch import Tensor

from dft.loss.dft import TokenStats, concatenate
from dft.loss.products import accumulated, product, wide_product
from dft.loss.rows import NO_WEIGHTS, RowOptions, RowWeights, score_rows_torch

TILE_BYTES = {"cpu": 384 * 2**20, "cuda": 1024 * 2**20}
"""Maximum size of one tile of logits, regardless of batch and vocabulary; a tile has at least one row. Large
tiles make the products efficient, and the weight's gradient is read and written less often."""
HALF_TILE_SHARE = 4
"""`TILE_BYTES` divided by the size of a tile of bfloat16 rows on a CPU. The memory of such a tile is reused
by the next one, because only gradients are stored for a group of tiles; the first access to new memory costs
more time than the larger products save."""
GROUP_BYTES = 2 * 2**30
"""Maximum size of the half-precision gradients of a group of tiles on a GPU, where they are written next to
the logits. One product per group sums the weight's gradient in float32 without storing it in float32; with
more than one group the float32 sum is stored, and read and written once per group. On a CPU the maximum is
`TILE_BYTES`."""
HALF_SCALE = 2.0**14
"""Factor on the gradients of float16 rows. float16 underflows below 6e-8, where most gradients are, and
overflows at 65,504. The gradients of a row are at most its weight before the division by N, and no objective
has weights above 2, so they are scaled up by this factor and divided by N afterwards in float32. Data weights
above 1 reduce the factor."""
LARGEST_GAP = 64.0
"""Largest log-ratio (in nats) between model and base at a token for which the gradient of the KL divergence,
which is proportional to it, still fits float16."""


class NeedsGrad(NamedTuple):
    """Flags for the inputs of the loss that require a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class HeadWeights(NamedTuple):
    """Weights of an output head.

    Attributes:
        weight: (vocab, hidden) in the dtype of the products.
        bias: (vocab,) or None.
        dtype: dtype of the weight's gradient.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class RowExtras(NamedTuple):
    """Optional per-token inputs of the supervised tokens.

    Attributes:
        weights: lower bounds on the weights of the tokens, and their weights in the data.
        base_rows: (tokens, base hidden) hidden states of the base model, in the dtype of the products.
        base_head: the head that belongs to `base_rows`.
    """

    weights: RowWeights = NO_WEIGHTS
    base_rows: Tensor | None = None
    base_head: HeadWeights | None = None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
RowRange = tuple[int, int]
"""A [start, end) range of rows."""


def run_tiles(
    rows: Tensor,
    head: HeadWeights,
    targets: Tensor,
    scale: Tensor,
    options: RowOptions,
    needs: NeedsGrad,
    extras: RowExtras,
) -> tuple[TokenStats, Gradients]:
    """Compute the statistics of all rows and the gradients of `scale * sum(w * nll)`, tile by tile.

    Args:
        rows: (tokens, hidden), in the dtype of the products.
        targets: (tokens,) int64.
        scale: scalar, 1 / N.

    Returns:
        stats: (tokens,) each. gradients: on rows (tokens, hidden), in their dtype, or in float32 for float16,
        which the unscaled values may not fit; on weight and bias in float32 or wider, or rounded to their
        dtype. None where no gradient is needed.
    """
    vocab, wide = len(head.weight), torch.promote_types(rows.dtype, torch.float32)
    row_scale, unscale = _row_scale(rows.dtype, scale, options, extras.weights.loss)
    spans = tiles(len(rows), vocab, wide.itemsize, tile_limit(rows.dtype, rows.device.type))
    buffers: list[Tensor | None] = [None, None]
    if rows.device.type == "cpu" and spans:  # on a GPU, torch's allocator reuses the memory of the last tile
        longest = max(end - start for start, end in spans)
        for index in range(1 if extras.base_rows is None else 2):
            buffers[index] = rows.new_empty(longest, vocab, dtype=wide)
    in_half = gradients_in_half(rows.dtype, rows.device.type) and any(needs)
    limit = group_limit(rows.device.type)
    tile_groups = groups(spans, vocab * rows.dtype.itemsize, limit) if in_half else [[span] for span in spans]
    sums = _GradientSums(rows, head, needs, only_group=len(tile_groups) == 1)
    parts: list[TokenStats] = []
    for group in tile_groups:
        first, last = group[0][0], group[-1][1]
        gradient = rows.new_empty(last - first, vocab) if in_half else None
        for start, end in group:
            tile = _head_output(rows[start:end], head, buffers[0])
            out = gradient[start - first : end - first] if gradient is not None else None
            weights = extras.weights.rows(start, end)
            base = None
            if extras.base_rows is not None and extras.base_head is not None:
                base = _head_output(extras.base_rows[start:end], extras.base_head, buffers[1])
            stats, written = score_rows(
                tile, targets[start:end], row_scale if any(needs) else None, options, out, weights, base
            )
            parts.append(stats)
            if gradient is None:
                gradient = written
            del tile, out, written, base  # so that only one tile, and one group's gradient, is allocated
        if gradient is not None:
            sums.add(gradient, first, last)
        del gradient
    return _concatenated(parts, targets, wide, extras.weights), sums.gradients(unscale)


class _GradientSums:
    """Sums the gradients of all tiles.

    Args:
        only_group: whether there is a single group of tiles, whose product is the whole sum.
    """

    def __init__(self, rows: Tensor, head: HeadWeights, needs: NeedsGrad, only_group: bool) -> None:
        self.rows, self.head, self.needs = rows, head, needs
        self.only_group = only_group
        self.wide = torch.promote_types(rows.dtype, torch.float32)
        narrow = self.wide if rows.dtype == torch.float16 else rows.dtype
        self.d_rows = torch.empty_like(rows, dtype=narrow) if needs.hidden else None
        self.d_weight: Tensor | None = None
        self.d_bias = rows.new_zeros(len(head.weight), dtype=self.wide) if needs.bias else None

    def add(self, gradient: Tensor, first: int, last: int) -> None:
        """Add the gradient on the head's output, (last - first, vocab), of rows first to last."""
        if self.d_rows is not None:
            product(gradient, self.head.weight, self.d_rows[first:last])
        if self.needs.weight:
            only = self.only_group and self.head.dtype == self.rows.dtype
            self.d_weight = accumulated(self.d_weight, gradient, self.rows[first:last], only)
        if self.d_bias is not None:
            self.d_bias += gradient.sum(0, dtype=self.wide)

    def gradients(self, unscale: Tensor | None) -> Gradients:
        """Return the sums on rows, weight and bias, multiplied by `unscale` unless it is None."""
        if self.needs.weight and not len(self.rows):
            self.d_weight = torch.zeros_like(self.head.weight)
        sums = (self.d_rows, self.d_weight, self.d_bias)
        for gradient in sums:
            if gradient is not None and unscale is not None:
                gradient *= unscale
        return sums


def gradients_in_half(dtype: torch.dtype, device: str) -> bool:
    """Return whether gradients on the head's output are stored in the half precision of the rows.

    float16 is not on a CPU, whose products of float16 are slow.
    """
    return dtype == torch.bfloat16 or (dtype == torch.float16 and device == "cuda")


def _row_scale(
    dtype: torch.dtype, scale: Tensor, options: RowOptions, loss_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the factor to apply to each row's gradient, and the factor to apply to the sums (None for 1).

    float16 gradients are scaled up to stay within its range, and scaled back in float32.
    """
    if dtype != torch.float16:
        return scale, None
    room = max(1.0, abs(options.scale)) * (1 + LARGEST_GAP * options.objective.kl_weight)
    row_scale = torch.full_like(scale, HALF_SCALE / room)
    if loss_weight is not None and len(loss_weight):
        row_scale = row_scale / loss_weight.max().clamp(min=1)
    return row_scale, scale / row_scale


def _concatenated(
    parts: list[TokenStats], targets: Tensor, wide: torch.dtype, weights: RowWeights
) -> TokenStats:
    """Return the statistics of all tiles as one; (0,) tensors if there are none."""
    if not parts:
        empty = targets.new_zeros(0, dtype=wide)
        return TokenStats(empty, empty, empty, empty.bool(), empty, targets, empty, weights.loss)
    return concatenate(parts)


def _head_output(rows: Tensor, head: HeadWeights, buffer: Tensor | None) -> Tensor:
    """Return the (rows, vocab) output of a head in float32 or wider, in `buffer` on a CPU."""
    z = wide_product(rows, head.weight, buffer)
    if head.bias is not None:
        z += head.bias
    return z


def tile_limit(dtype: torch.dtype, device: str) -> int:
    """Return the maximum bytes of a tile of logits of rows of this dtype, on this type of device."""
    if device == "cpu" and gradients_in_half(dtype, device):
        return TILE_BYTES[device] // HALF_TILE_SHARE
    return TILE_BYTES.get(device, TILE_BYTES["cuda"])


def group_limit(device: str) -> int:
    """Return the maximum bytes of the half-precision gradients of a group of tiles."""
    return TILE_BYTES["cpu"] if device == "cpu" else GROUP_BYTES


def tiles(tokens: int, vocab: int, itemsize: int, limit: int) -> list[RowRange]:
    """Return the rows of each tile: as few tiles as fit `limit` bytes each, of about equal size."""
    rows_per_tile = max(1, limit // (vocab * itemsize))
    count = -(-tokens // rows_per_tile)
    bounds = [tokens * index // count for index in range(count + 1)] if count else []
    return list(zip(bounds, bounds[1:], strict=False))


def groups(spans: list[RowRange], row_bytes: int, limit: int) -> list[list[RowRange]]:
    """Group consecutive tiles whose rows together take at most `limit` bytes."""
    result: list[list[RowRange]] = []
    for start, end in spans:
        if result and (end - result[-1][0][0]) * row_bytes <= limit:
            result[-1].append((start, end))
        else:
            result.append([(start, end)])
    return result


def score_rows(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    out: Tensor | None = None,
    weights: RowWeights = NO_WEIGHTS,
    base: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Compute the statistics of rows of a head's output, and the gradient of the loss on it.

    The loss is `row_scale * sum(w * nll)`; with a base model `row_scale * sum(w * nll + kl_weight * kl)`.

    Args:
        tile: (rows, vocab), float32 or wider. It is overwritten.
        targets: (rows,) int64.
        row_scale: scalar; None to compute the statistics only.
        out: (rows, vocab) in half precision, which receives the gradient. Default: the gradient overwrites
            the tile.
        weights: lower bounds on the weights of the rows, and their weights in the data.
        base: (rows, vocab) output of the base model's head, in the tile's dtype. It may be overwritten.

    Returns:
        stats: (rows,) each, in the tile's dtype except for `correct` and `target`. gradient: (rows, vocab),
        or None without a `row_scale`.
    """
    if tile.is_cuda and tile.dtype == torch.float32:
        from dft.loss.kernels import score_rows as score_rows_triton  # triton comes with CUDA builds of torch

        return score_rows_triton(tile, targets, row_scale, options, out, weights, base)
    return score_rows_torch(tile, targets, row_scale, options, weights, base, out)
