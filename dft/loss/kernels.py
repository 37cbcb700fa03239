"""The rows of a tile on a GPU, in one kernel: two readings of the logits and one writing of their gradient.

`TRITON_INTERPRET=1` runs it on the CPU, which is how it is tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dft.loss.dft import TokenStats
from dft.loss.rows import Shape

BLOCK = 4096
"""Logits of a row that are read at a time."""


@triton.jit
def _logits(tile, columns, inside, scale, softcap, SOFTCAP: tl.constexpr):
    z = tl.load(tile + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
    if SOFTCAP:
        # tanh by way of the sigmoid; padding stays at -inf.
        z = tl.where(inside, softcap * (2 * tl.sigmoid(2 * z / softcap) - 1), float("-inf"))
    return z


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
    vocab,
    tile_stride,
    gradient_stride,
    alpha,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * tile_stride
    gradient += row * gradient_stride
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)

    # Online: the greatest logit so far, where it stands, and sums of exp(z - top) and of exp(z - top) * z.
    top = float("-inf")
    best = tl.full((), 0, tl.int64)
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + offsets
        inside = columns < vocab
        z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
        # NaN must come out as NaN, which a maximum would hide.
        here, where = tl.max(z, 0, return_indices=True)
        if here > top:
            best = (start + where).to(tl.int64)
        new = tl.maximum(top, here)
        # As long as all are -inf there is nothing to sum.
        shift = tl.where(new == float("-inf"), 0.0, new)
        rescale = tl.exp(top - shift)
        e = tl.exp(z - shift)
        total = total * rescale + tl.sum(e, 0)
        weighted = weighted * rescale + tl.sum(tl.where(e == 0, 0.0, e * z), 0)
        top = new
    log_sum = top + tl.log(total)
    z_target = tl.load(tile + target).to(tl.float32) * scale
    if SOFTCAP:
        z_target = softcap * (2 * tl.sigmoid(2 * z_target / softcap) - 1)
    nll = log_sum - z_target
    p = tl.exp(-nll)
    weight = alpha * p + (1 - alpha)
    tl.store(nll_out + row, nll)
    tl.store(p_out + row, p)
    tl.store(weight_out + row, weight)
    tl.store(correct_out + row, best == target)
    tl.store(entropy_out + row, log_sum - weighted / total)

    if GRADIENT:
        factor = weight * tl.load(row_scale).to(tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            inside = columns < vocab
            z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
            g = factor * (tl.exp(z - log_sum) - tl.where(columns == target, 1.0, 0.0)) * scale
            if SOFTCAP:
                g *= 1 - (z / softcap) * (z / softcap)
            tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=inside)


def score_rows(
    tile: Tensor, targets: Tensor, row_scale: Tensor | None, shape: Shape, dtype: torch.dtype
) -> tuple[TokenStats, Tensor | None]:
    """`dft.loss.rows.score_rows` for float32 tiles: the gradient overwrites a tile, or is written beside it
    in half precision."""
    rows, vocab = tile.shape
    gradient = None
    if row_scale is not None:
        gradient = tile if dtype == tile.dtype else torch.empty_like(tile, dtype=dtype)
    nll, p_correct, weight, entropy = (tile.new_empty(rows) for _ in range(4))
    correct = torch.empty(rows, dtype=torch.bool, device=tile.device)
    _rows[(rows,)](
        tile,
        tile if gradient is None else gradient,
        targets,
        targets if row_scale is None else row_scale,
        nll,
        p_correct,
        weight,
        correct,
        entropy,
        vocab,
        tile.stride(0),
        tile.stride(0) if gradient is None else gradient.stride(0),
        shape.alpha,
        shape.scale,
        1.0 if shape.softcap is None else shape.softcap,
        SOFTCAP=shape.softcap is not None,
        GRADIENT=gradient is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
    )
    return TokenStats(nll, p_correct, weight, correct, entropy), gradient
