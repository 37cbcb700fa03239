"""The rows of a tile on a GPU: two readings of the logits and one writing of their gradient.

In one kernel where the weight of a token is a * p + b; else one for the statistics, the objective's own
formula on these, and one for the gradient, so that no objective needs a kernel of its own.

`TRITON_INTERPRET=1` runs it on the CPU, which is how it is tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dft.loss.dft import TokenStats
from dft.loss.objectives import Rows, lifted
from dft.loss.rows import RowOptions

BLOCK = 4096
"""Numbers that are read at a time."""
WARPS = 4
"""Of 32 threads each, that work on a row."""


@triton.jit
def _logits(tile, columns, inside, scale, softcap, SOFTCAP: tl.constexpr):
    z = tl.load(tile + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # tanh
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _rows(
    tile,
    gradient,
    targets,
    row_scale,
    nll_out,
    p_out,
    weight_out,
    correct_out,
    entropy_out,
    top_out,
    total_out,
    vocab,
    tile_stride,
    gradient_stride,
    slope,
    level,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * tile_stride
    gradient += row * gradient_stride
    target = tl.load(targets + row)
    # Read before the reductions, whose barriers all warps pass before one of them overwrites the tile with
    # its gradient. A target that is no token gives NaN, which shows, and reads nothing.
    known = (target >= 0) & (target < vocab)
    z_target = tl.load(tile + target, mask=known, other=float("nan")).to(tl.float32) * scale
    if SOFTCAP:
        z_target = softcap * (2 * tl.sigmoid(2 * z_target / softcap) - 1)
    offsets = tl.arange(0, BLOCK)

    # Online: the greatest logit so far, where it stands, and sums of e = exp(z - top) and of e * (z - top).
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
        # As long as all are -inf there is nothing to sum. NaN and +inf come out as NaN by way of exp.
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
    tile,
    gradient,
    targets,
    factors,
    tops,
    totals,
    vocab,
    tile_stride,
    gradient_stride,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    into: Tensor | None = None,
    min_weight: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """`dft.loss.linear.score_rows` for float32 tiles, without a base model."""
    rows, vocab = tile.shape
    gradient = None
    if row_scale is not None:
        gradient = tile if into is None else into
    line = options.objective.line if min_weight is None else None
    at_once = gradient is not None and line is not None
    nll, p_correct, weight, entropy = (tile.new_empty(rows) for _ in range(4))
    top, total = (tile.new_empty(rows if line is None else 0) for _ in range(2))
    correct = torch.empty(rows, dtype=torch.bool, device=tile.device)
    slope, level = (0.0, 0.0) if line is None else line
    softcap = 1.0 if options.softcap is None else float(options.softcap)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(tile):
        _rows[(rows,)](
            tile,
            gradient if at_once else tile,
            targets,
            row_scale if at_once else tile,
            nll,
            p_correct,
            weight,
            correct,
            entropy,
            top,
            total,
            vocab,
            tile.stride(0),
            gradient.stride(0) if at_once else tile.stride(0),
            float(slope),
            float(level),
            float(options.scale),
            softcap,
            SOFTCAP=options.softcap is not None,
            GRADIENT=at_once,
            KEEP=line is None,
            BLOCK=block,
            num_warps=WARPS,
        )
        if line is None:
            seen = Rows(nll, p_correct, entropy, _largest(tile, options))
            weight = lifted(options.objective.weight(seen), min_weight)
        if gradient is not None and not at_once:
            _gradients[(rows,)](
                tile,
                gradient,
                targets,
                weight * row_scale * options.scale,
                top,
                total,
                vocab,
                tile.stride(0),
                gradient.stride(0),
                float(options.scale),
                softcap,
                SOFTCAP=options.softcap is not None,
                BLOCK=block,
                num_warps=WARPS,
            )
    return TokenStats(nll, p_correct, weight, correct, entropy, targets, torch.zeros_like(nll)), gradient


def _largest(tile: Tensor, options: RowOptions) -> Tensor | None:
    """The logits that the objective wants to see, of a head's output."""
    wanted = min(options.objective.largest, tile.shape[1])
    if not wanted:
        return None
    z = tile.topk(wanted, largest=options.scale > 0).values * options.scale
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
    """numbers *= factor. Whether that is 1, and nothing to do, is seen on the device: the host need not wait.

    Args:
        numbers: contiguous, in float32 or half precision.
        factor: scalar on the same device.
    """
    with torch.cuda.device_of(numbers):
        _scale[(triton.cdiv(numbers.numel(), BLOCK),)](numbers, factor, numbers.numel(), BLOCK=BLOCK)
    return numbers
