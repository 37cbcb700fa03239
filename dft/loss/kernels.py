"""Triton kernels of the fused head: reads the logits of a row twice and writes their gradient once.

If the weight of a token is a * p + b, a single kernel does everything. Otherwise, or if tokens have a lower
bound or a weight in the data, one kernel computes the statistics, the objective computes the weights from
them in torch, and a second kernel writes the gradient, so that no objective needs its own kernel.

`TRITON_INTERPRET=1` runs the kernels on the CPU; the tests do so if there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dft.loss.dft import TokenStats
from dft.loss.objectives import TokenRows
from dft.loss.rows import NO_WEIGHTS, RowOptions, RowWeights

BLOCK = 4096
"""Number of logits processed at a time."""
WARPS = 4
"""Number of warps (of 32 threads each) per row."""


@triton.jit
def _logits(tile, columns, inside, scale, softcap, SOFTCAP: tl.constexpr):
    z = tl.load(tile + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # tanh
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _rows(
    tile, gradient, targets, row_scale, nll_out, p_out, weight_out, correct_out, entropy_out, top_out,
    total_out, vocab, tile_stride, gradient_stride, slope, level, scale, softcap, SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile += row * tile_stride
    gradient += row * gradient_stride
    target = tl.load(targets + row)
    # Read before the reductions: their barriers guarantee that all warps have read it before one of them
    # overwrites the tile with the gradient. A target outside the vocabulary gives NaN without reading memory.
    valid = (target >= 0) & (target < vocab)
    z_target = tl.load(tile + target, mask=valid, other=float("nan")).to(tl.float32) * scale
    if SOFTCAP:
        z_target = softcap * (2 * tl.sigmoid(2 * z_target / softcap) - 1)
    offsets = tl.arange(0, BLOCK)
    # Online softmax: the largest logit so far, its index, and sums of e = exp(z - top) and of e * (z - top).
    top = float("-inf")
    best = tl.full((), 0, tl.int64)
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + offsets
        inside = columns < vocab
        z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
        here, where = tl.max(z, 0, return_indices=True)
        if here > top:
            best = (start + where).to(tl.int64)
        new = tl.maximum(top, here)
        # The sums stay 0 as long as all logits are -inf. NaN and +inf propagate as NaN through exp.
        shift = tl.where(new == float("-inf"), 0.0, new)
        moved = tl.where(top == float("-inf"), 0.0, top - shift)
        rescale = tl.where(top == float("-inf"), 0.0, tl.exp(moved))
        e = tl.exp(z - shift)
        weighted = (weighted + total * moved) * rescale + tl.sum(tl.where(e == 0, 0.0, e * (z - shift)), 0)
        total = total * rescale + tl.sum(e, 0)
        top = new
    log_total = tl.log(total)
    nll = (top - z_target) + log_total
    p = tl.exp(-nll)
    weight = slope * p + level
    tl.store(nll_out + row, nll)
    tl.store(p_out + row, p)
    tl.store(weight_out + row, weight)
    tl.store(correct_out + row, best == target)
    tl.store(entropy_out + row, log_total - weighted / total)
    if KEEP:
        tl.store(top_out + row, top)
        tl.store(total_out + row, total)

    if GRADIENT:
        factor = weight * tl.load(row_scale).to(tl.float32) * scale
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            inside = columns < vocab
            z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
            g = factor * (tl.exp(z - top) / total - tl.where(columns == target, 1.0, 0.0))
            if SOFTCAP:
                g *= 1 - (z / softcap) * (z / softcap)
            tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    tile, gradient, targets, factors, tops, totals, vocab, tile_stride, gradient_stride, scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile += row * tile_stride
    gradient += row * gradient_stride
    target = tl.load(targets + row)
    factor = tl.load(factors + row)
    top = tl.load(tops + row)
    total = tl.load(totals + row)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        columns = start + offsets
        inside = columns < vocab
        z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
        g = factor * (tl.exp(z - top) / total - tl.where(columns == target, 1.0, 0.0))
        if SOFTCAP:
            g *= 1 - (z / softcap) * (z / softcap)
        tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=inside)


def score_rows(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    out: Tensor | None = None,
    weights: RowWeights = NO_WEIGHTS,
) -> tuple[TokenStats, Tensor | None]:
    """Compute `dft.loss.tiles.score_rows` for float32 tiles without a base model."""
    rows = len(tile)
    gradient = None
    if row_scale is not None:
        gradient = tile if out is None else out
    affine = options.objective.affine if all(values is None for values in weights) else None
    nll, p_correct, weight, entropy = (tile.new_empty(rows) for _ in range(4))
    top, total = (tile.new_empty(rows if affine is None else 0) for _ in range(2))
    correct = torch.empty(rows, dtype=torch.bool, device=tile.device)
    outputs = (nll, p_correct, weight, correct, entropy, top, total)
    _launch_rows(tile, targets, options, outputs, affine, row_scale, gradient)
    if affine is None:
        statistics = TokenRows(nll, p_correct, entropy, _largest(tile, options))
        weight = weights.apply(options.objective.weight(statistics))
        if row_scale is not None and gradient is not None:
            factors = weight * row_scale * options.scale
            _launch_gradients(tile, targets, options, factors, top, total, gradient)
    kl = torch.zeros_like(nll)
    return TokenStats(nll, p_correct, weight, correct, entropy, targets, kl, weights.loss), gradient


def _launch_rows(
    tile: Tensor,
    targets: Tensor,
    options: RowOptions,
    outputs: tuple[Tensor, ...],
    affine: tuple[float, float] | None,
    row_scale: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Launch `_rows`, which also writes the gradient if the weight is affine in p."""
    rows, vocab = tile.shape
    with_gradient = gradient is not None and affine is not None
    slope, level = affine or (0.0, 0.0)
    written = tile if gradient is None or affine is None else gradient
    with torch.cuda.device_of(tile):
        _rows[(rows,)](
            tile,
            written,
            targets,
            row_scale if with_gradient else tile,
            *outputs,
            vocab,
            tile.stride(0),
            written.stride(0),
            float(slope),
            float(level),
            float(options.scale),
            1.0 if options.softcap is None else float(options.softcap),
            SOFTCAP=options.softcap is not None,
            GRADIENT=with_gradient,
            KEEP=affine is None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
        )


def _launch_gradients(
    tile: Tensor,
    targets: Tensor,
    options: RowOptions,
    factors: Tensor,
    top: Tensor,
    total: Tensor,
    gradient: Tensor,
) -> None:
    """Launch `_gradients` with the (rows,) factors computed from the objective's weights."""
    rows, vocab = tile.shape
    with torch.cuda.device_of(tile):
        _gradients[(rows,)](
            tile,
            gradient,
            targets,
            factors,
            top,
            total,
            vocab,
            tile.stride(0),
            gradient.stride(0),
            float(options.scale),
            1.0 if options.softcap is None else float(options.softcap),
            SOFTCAP=options.softcap is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
        )


def _largest(tile: Tensor, options: RowOptions) -> Tensor | None:
    """Return the largest logits of each row that the objective uses, (rows, largest)."""
    count = min(options.objective.largest, tile.shape[1])
    if not count:
        return None
    z = tile.topk(count, largest=options.scale > 0).values * options.scale
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


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
