"""Launches of the Triton kernels of the fused head.

If the weight of a token is a * p + b, a single kernel does everything. Otherwise, or if tokens have a lower
bound or a weight in the data, one kernel computes the statistics, the objective computes the weights from
them in torch, and a second kernel writes the gradient, so that no objective needs its own kernel. The same
kernels read the logits of a base model beside those of the model, for the divergence from it, and write the
largest logit of each chunk for objectives that use the largest of a row.

`TRITON_INTERPRET=1` runs the kernels on the CPU; the tests do so if there is no GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dft.loss.dft import TokenStats, times
from dft.loss.objectives import TokenRows
from dft.loss.row_kernels import row_gradients, row_statistics
from dft.loss.rows import CHUNK, NO_WEIGHTS, LogitTransform, RowOptions, RowWeights

BLOCK = 4096
"""Number of logits processed at a time."""
WARPS = 4
"""Number of warps (of 32 threads each) per row."""
BASE_WARPS = 8
"""The same where a row of a base model is processed with it, so that a thread needs no more registers."""


class _Kept(NamedTuple):
    """Statistics of rows that the gradient kernel reads, (rows,) each; (0,) if one kernel does both.

    Attributes:
        top, total: largest logit, and sum of exp(logit - top).
        base_top, gap: largest logit of the base model, and the logarithm of total minus that of its total.
    """

    top: Tensor
    total: Tensor
    base_top: Tensor
    gap: Tensor


def score_rows(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    out: Tensor | None = None,
    weights: RowWeights = NO_WEIGHTS,
    base: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Compute `dft.loss.tiles.score_rows` for float32 tiles."""
    rows, vocab = tile.shape
    gradient = None
    if row_scale is not None:
        gradient = tile if out is None else out
    affine = options.objective.affine if all(values is None for values in weights) else None
    nll, p_correct, weight, entropy = (tile.new_empty(rows) for _ in range(4))
    kl = torch.zeros_like(nll)
    kept = _Kept(*(tile.new_empty(rows if affine is None else 0) for _ in _Kept._fields))
    correct = torch.empty(rows, dtype=torch.bool, device=tile.device)
    collision = tile.new_empty(rows if options.objective.needs_collision else 0)
    outputs = (nll, p_correct, weight, correct, entropy, kl, collision, *kept)
    chunk, maxima = _chunk_maxima(tile, options)
    _launch_rows(tile, base, targets, options, outputs, affine, row_scale, gradient, chunk, maxima)
    if affine is None:
        largest = _largest(tile, options, chunk, maxima)
        squares = collision if options.objective.needs_collision else None
        statistics = TokenRows(nll, p_correct, entropy, largest, weights.base_logp, squares)
        weight = weights.apply(options.objective.weight(statistics))
        if row_scale is not None and gradient is not None:
            scale = row_scale * options.scale
            kl_factors = times((options.objective.kl_weight * scale).expand_as(kl), weights.loss)
            _launch_gradients(
                tile, base, targets, options, weight * scale, kl_factors.contiguous(), kl, kept, gradient
            )
    return TokenStats(nll, p_correct, weight, correct, entropy, targets, kl, weights.loss), gradient


def _launch_rows(
    tile: Tensor,
    base: Tensor | None,
    targets: Tensor,
    options: RowOptions,
    outputs: tuple[Tensor, ...],
    affine: tuple[float, float] | None,
    row_scale: Tensor | None,
    gradient: Tensor | None,
    chunk: int,
    maxima: Tensor,
) -> None:
    """Launch `row_statistics`, which also writes the gradient if the weight is affine in p."""
    rows, vocab = tile.shape
    with_gradient = gradient is not None and affine is not None
    slope, level = affine or (0.0, 0.0)
    written = tile if gradient is None or affine is None else gradient
    other = tile if base is None else base
    with torch.cuda.device_of(tile):
        row_statistics[(rows,)](
            tile,
            other,
            written,
            targets,
            row_scale if with_gradient else tile,
            *outputs,
            maxima,
            vocab,
            tile.stride(0),
            other.stride(0),
            written.stride(0),
            maxima.stride(0),
            float(slope),
            float(level),
            float(options.objective.kl_weight),
            float(options.scale),
            1.0 if options.softcap is None else float(options.softcap),
            SOFTCAP=options.softcap is not None,
            BASE=base is not None,
            CHUNK=chunk,
            COLLISION=options.objective.needs_collision,
            GRADIENT=with_gradient,
            KEEP=affine is None,
            BLOCK=_block(vocab),
            num_warps=WARPS if base is None else BASE_WARPS,
        )


def _launch_gradients(
    tile: Tensor,
    base: Tensor | None,
    targets: Tensor,
    options: RowOptions,
    factors: Tensor,
    kl_factors: Tensor,
    kl: Tensor,
    kept: _Kept,
    gradient: Tensor,
) -> None:
    """Launch `row_gradients` with the (rows,) factors computed from the objective's weights."""
    rows, vocab = tile.shape
    other = tile if base is None else base
    with torch.cuda.device_of(tile):
        row_gradients[(rows,)](
            tile,
            other,
            gradient,
            targets,
            factors,
            kept.top,
            kept.total,
            kl_factors,
            kl,
            kept.base_top,
            kept.gap,
            vocab,
            tile.stride(0),
            other.stride(0),
            gradient.stride(0),
            float(options.scale),
            1.0 if options.softcap is None else float(options.softcap),
            SOFTCAP=options.softcap is not None,
            BASE=base is not None,
            BLOCK=_block(vocab),
            num_warps=WARPS if base is None else BASE_WARPS,
        )


def _block(vocab: int) -> int:
    """Return the number of logits processed at a time."""
    return min(BLOCK, triton.next_power_of_2(vocab))


def _chunk_maxima(tile: Tensor, options: RowOptions) -> tuple[int, Tensor]:
    """Return the size of chunks and memory for the largest logit of each, (rows, chunks).

    The size is 0, and the memory empty, if the objective uses no largest logits, or too many of a row.
    """
    rows, vocab = tile.shape
    chunks, count = triton.cdiv(vocab, CHUNK), options.objective.largest
    if not count or chunks <= 2 * count or _block(vocab) < CHUNK:
        return 0, tile.new_empty(0, 0)
    return CHUNK, tile.new_empty(rows, chunks)


def _largest(tile: Tensor, options: RowOptions, chunk: int, maxima: Tensor) -> Tensor | None:
    """Return the largest logits of each row that the objective uses, (rows, largest)."""
    vocab = tile.shape[1]
    count = min(options.objective.largest, vocab)
    if not count:
        return None
    transform = LogitTransform(options.scale, options.softcap)
    if not chunk:
        return transform(tile.topk(count, largest=options.scale > 0).values)
    # They are among the columns of the chunks with the largest maxima, so only these are sorted.
    first = maxima.topk(count).indices[:, :, None] * chunk
    columns = (first + torch.arange(chunk, device=tile.device)).flatten(1)
    candidates = transform(tile.gather(1, columns.clamp(max=vocab - 1)))
    return candidates.masked_fill(columns >= vocab, float("-inf")).topk(count).values


@triton.jit
def _scale(numbers, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < count
        scaled = tl.load(numbers + columns, mask=inside).to(tl.float32) * by
        tl.store(numbers + columns, scaled.to(numbers.dtype.element_ty), mask=inside)


def scale_(numbers: Tensor, factor: Tensor) -> Tensor:
    """Compute numbers *= factor in place; a factor of 1 is detected on the device, without synchronization.

    Args:
        numbers: contiguous, in float32 or half precision.
        factor: scalar on the same device.
    """
    with torch.cuda.device_of(numbers):
        _scale[(triton.cdiv(numbers.numel(), BLOCK),)](numbers, factor, numbers.numel(), BLOCK=BLOCK)
    return numbers
