"""Triton kernels over rows of logits: they read a row twice and write its gradient once."""

import triton
import triton.language as tl


@triton.jit
def _logits(tile, columns, inside, scale, softcap, SOFTCAP: tl.constexpr):
    z = tl.load(tile + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # tanh
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _target_logit(tile, target, vocab, scale, softcap, SOFTCAP: tl.constexpr):
    # A target outside the vocabulary gives NaN without reading memory.
    valid = (target >= 0) & (target < vocab)
    z = tl.load(tile + target, mask=valid, other=float("nan")).to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z


@triton.jit
def _shifts(top, here):
    """Update the largest logit of an online softmax.

    Returns the new one, the value to subtract, the change of it, and the factor on sums so far. Sums stay 0
    as long as all logits are -inf. NaN and +inf propagate as NaN through exp.
    """
    new = tl.maximum(top, here)
    shift = tl.where(new == float("-inf"), 0.0, new)
    moved = tl.where(top == float("-inf"), 0.0, top - shift)
    return new, shift, moved, tl.where(top == float("-inf"), 0.0, tl.exp(moved))


@triton.jit
def _base_sums(y, e, shifted, base_top, base_total, crossed, total, moved, rescale):
    """Add a block of the base model's logits y to its sums, before the block is added to the model's."""
    base_top, shift, base_moved, base_rescale = _shifts(base_top, tl.max(y, 0))
    base_total = base_total * base_rescale + tl.sum(tl.exp(y - shift), 0)
    crossed = tl.where(rescale == 0, 0.0, (crossed + total * (moved - base_moved)) * rescale)
    crossed += tl.sum(tl.where(e == 0, 0.0, e * (shifted - (y - shift))), 0)
    return base_top, base_total, crossed


@triton.jit
def _row_sums(
    tile, base, maxima_out, vocab, scale, softcap, SOFTCAP: tl.constexpr, BASE: tl.constexpr,
    CHUNK: tl.constexpr, COLLISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return what the statistics of a row are computed from, and write the largest logit of each chunk."""
    offsets = tl.arange(0, BLOCK)
    # Online softmax: the largest logit so far, its index, and sums of e = exp(z - top) and of e * (z - top).
    top = float("-inf")
    best = tl.full((), 0, tl.int64)
    total = 0.0
    weighted = 0.0
    squares = 0.0  # the sum of e * e
    # The same of the base model, and the sum of e * ((z - top) - (y - base_top)).
    base_top = float("-inf")
    base_total = 0.0
    crossed = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + offsets
        inside = columns < vocab
        z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
        if CHUNK:
            maxima = tl.max(tl.reshape(z, (BLOCK // CHUNK, CHUNK)), 1)
            chunks = start // CHUNK + tl.arange(0, BLOCK // CHUNK)
            tl.store(maxima_out + chunks, maxima, mask=chunks * CHUNK < vocab)
        here, where = tl.max(z, 0, return_indices=True)
        if here > top:
            best = (start + where).to(tl.int64)
        top, shift, moved, rescale = _shifts(top, here)
        e = tl.exp(z - shift)
        if BASE:
            y = _logits(base, columns, inside, scale, softcap, SOFTCAP)
            base_top, base_total, crossed = _base_sums(
                y, e, z - shift, base_top, base_total, crossed, total, moved, rescale
            )
        weighted = (weighted + total * moved) * rescale + tl.sum(tl.where(e == 0, 0.0, e * (z - shift)), 0)
        total = total * rescale + tl.sum(e, 0)
        if COLLISION:
            squares = squares * rescale * rescale + tl.sum(e * e, 0)
    return top, best, total, weighted, squares, base_top, base_total, crossed


@triton.jit
def row_statistics(
    tile, base, gradient, targets, row_scale, nll_out, p_out, weight_out, correct_out, entropy_out, kl_out,
    collision_out, top_out, total_out, base_top_out, gap_out, maxima_out, vocab, tile_stride, base_stride,
    gradient_stride, maxima_stride, slope, level, kl_weight, scale, softcap, SOFTCAP: tl.constexpr,
    BASE: tl.constexpr, CHUNK: tl.constexpr, COLLISION: tl.constexpr, GRADIENT: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile += row * tile_stride
    base += row * base_stride
    gradient += row * gradient_stride
    maxima_out += row * maxima_stride
    target = tl.load(targets + row)
    # Read before the reductions: their barriers guarantee that all warps have read it before one of them
    # overwrites the tile with the gradient.
    z_target = _target_logit(tile, target, vocab, scale, softcap, SOFTCAP)
    top, best, total, weighted, squares, base_top, base_total, crossed = _row_sums(
        tile, base, maxima_out, vocab, scale, softcap, SOFTCAP, BASE, CHUNK, COLLISION, BLOCK
    )
    log_total = tl.log(total)
    nll = (top - z_target) + log_total
    p = tl.exp(-nll)
    weight = slope * p + level
    gap = 0.0
    kl = 0.0
    if BASE:
        gap = log_total - tl.log(base_total)
        kl = crossed / total - gap
        tl.store(kl_out + row, kl)
    tl.store(nll_out + row, nll)
    tl.store(p_out + row, p)
    tl.store(weight_out + row, weight)
    tl.store(correct_out + row, best == target)
    tl.store(entropy_out + row, log_total - weighted / total)
    if COLLISION:
        tl.store(collision_out + row, squares / (total * total))
    if KEEP:
        tl.store(top_out + row, top)
        tl.store(total_out + row, total)
        if BASE:
            tl.store(base_top_out + row, base_top)
            tl.store(gap_out + row, gap)

    if GRADIENT:
        by = tl.load(row_scale).to(tl.float32) * scale
        _write_gradient(
            tile, base, gradient, target, weight * by, kl_weight * by, kl, top, total, base_top, gap, vocab,
            scale, softcap, SOFTCAP, BASE, BLOCK,
        )  # fmt: skip


@triton.jit
def _write_gradient(
    tile, base, gradient, target, factor, kl_factor, kl, top, total, base_top, gap, vocab, scale, softcap,
    SOFTCAP: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row: factor * (p - onehot) + kl_factor * p * (log p - log base - kl)."""
    offsets = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        columns = start + offsets
        inside = columns < vocab
        z = _logits(tile, columns, inside, scale, softcap, SOFTCAP)
        p = tl.exp(z - top) / total
        g = factor * (p - tl.where(columns == target, 1.0, 0.0))
        if BASE:
            y = _logits(base, columns, inside, scale, softcap, SOFTCAP)
            surplus = (z - top) - (y - base_top) - gap - kl
            g += tl.where(p == 0, 0.0, kl_factor * p * surplus)
        if SOFTCAP:
            g *= 1 - (z / softcap) * (z / softcap)
        tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def row_gradients(
    tile, base, gradient, targets, factors, tops, totals, kl_factors, kls, base_tops, gaps, vocab,
    tile_stride, base_stride, gradient_stride, scale, softcap, SOFTCAP: tl.constexpr, BASE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kl_factor = 0.0
    kl = 0.0
    base_top = 0.0
    gap = 0.0
    if BASE:
        kl_factor = tl.load(kl_factors + row)
        kl = tl.load(kls + row)
        base_top = tl.load(base_tops + row)
        gap = tl.load(gaps + row)
    _write_gradient(
        tile + row * tile_stride, base + row * base_stride, gradient + row * gradient_stride,
        tl.load(targets + row), tl.load(factors + row), kl_factor, kl, tl.load(tops + row),
        tl.load(totals + row), base_top, gap, vocab, scale, softcap, SOFTCAP, BASE, BLOCK,
    )  # fmt: skip
