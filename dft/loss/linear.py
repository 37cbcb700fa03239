"""The DFT loss straight from hidden states: the logits are never all there.

The weight of a token is detached and depends on its own row alone, so the gradient on the logits,
w_t * (softmax - onehot) / N, is known as soon as the row is. Rows are taken in tiles: one product gives their
logits, the statistics come from these, the logits make room for their gradient, and two products carry it to
the hidden states and to the weight. That is 6 * N * D * V operations for forward and backward, where keeping
no logits otherwise means computing them twice (8 * N * D * V). The backward only scales.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dft.labels import loss_positions
from dft.loss.dft import TokenStats, check_alpha, normalizer
from dft.loss.rows import RowOptions, score_rows

TILE_BYTES = {"cpu": 384 * 2**20, "cuda": 1024 * 2**20}
"""What one tile of logits may take, whatever batch and vocabulary are, as long as a single row fits. Of large
tiles the products are efficient, and the weight's gradient is read and written less often."""
GROUP_BYTES = 2 * 2**30
"""What the gradient of some tiles may take in half precision on a GPU, where it is written beside the logits.
One product for all of them sums the weight's gradient in float32 without ever holding it so; with more than
one group the sum is held, and read and written for each."""
BLOCK_BYTES = 32 * 2**20
"""What is converted at a time of a weight in half precision, where a product cannot give float32 itself."""
HALF_SCALE = 2.0**14
"""float16 ends at 6e-8, above most gradients, and at 65,504. Those of a row sum to at most 2 before they are
divided by N, so they are written this much larger, and divided afterwards in float32."""


class Wanted(NamedTuple):
    """Of what the gradient is asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Head(NamedTuple):
    """weight: (vocab, hidden) in the precision of the products. bias: (vocab,) or None. dtype: that of the
    weight's gradient."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_dft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    num_items: Tensor | float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    positions: Tensor | None = None,
    shifted: bool = False,
) -> tuple[Tensor, TokenStats]:
    """`dft_loss(logits, labels, ...)` of `logits = hidden @ weight.T + bias`, without the logits.

    Logits, statistics and the sum of the weight's gradient are float32 (float64 for float64 input), whatever
    the precision of the products. Under autocast the products are in its precision, on a CPU in the weight's.
    (There is one more rounding on a CPU: each tile's share in the gradient of a bfloat16 weight is bfloat16.)

    Args:
        hidden: (batch, seq, hidden).
        weight: (vocab, hidden). If it requires no gradient, none is computed.
        labels: (batch, seq), not shifted: hidden[:, t] predicts labels[:, t + 1]. Unsupervised: -100.
        alpha: share of the dynamic weight, in [0, 1].
        num_items: N, the supervised tokens of the whole optimizer step. Default: those of this batch.
        bias: (vocab,).
        logit_scale, logit_softcap: the logits are cap * tanh(scale * z / cap), or scale * z without a cap.
        positions: (tokens,) int64, where labels[:, t + 1] is supervised as b * seq + t, ascending. Given, the
            host need not wait for the device to count them.
        shifted: whether hidden[:, t] predicts labels[:, t], and positions say so, too.

    Returns:
        (loss, stats) as `dft_loss` does. The loss has a first derivative only, to be asked for once.

    Raises:
        ValueError: shapes that do not fit, or alpha outside [0, 1].
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or weight.shape[1:] != hidden.shape[2:]:
        raise ValueError(
            "hidden must be (batch, seq, hidden), labels (batch, seq) and weight (vocab, hidden), got "
            f"{tuple(hidden.shape)}, {tuple(labels.shape)} and {tuple(weight.shape)}"
        )
    if isinstance(num_items, Tensor) and num_items.ndim:
        raise ValueError(f"num_items must be a scalar, got a tensor of shape {tuple(num_items.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (vocab,), got {tuple(bias.shape)} with {weight.shape[0]} tokens")
    check_alpha(alpha)
    if positions is None:
        positions = loss_positions(labels, shifted)
    targets = labels.flatten()[positions if shifted else positions + 1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = normalizer(num_items, targets)
    # Filled on the device: to copy a number there would wait for it.
    scale = (torch.ones((), dtype=wide, device=hidden.device) / count).to(wide)
    wanted = Wanted(
        *(torch.is_grad_enabled() and one is not None and one.requires_grad for one in (hidden, weight, bias))
    )
    options = RowOptions(alpha, logit_scale, logit_softcap)
    loss, *stats = _LinearDFT.apply(hidden, weight, bias, positions, targets, scale, options, wanted)
    return loss, TokenStats(*stats)


class _LinearDFT(torch.autograd.Function):
    """(loss, nll, p_correct, weight, correct, entropy, target); all but the loss are detached."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        scale: Tensor,
        options: RowOptions,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        dtype = product_dtype(hidden, weight)
        with torch.autocast(device, enabled=False):
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).to(dtype)
            head = Head(weight.detach().to(dtype), None if bias is None else bias.detach(), weight.dtype)
            stats, gradients = run_tiles(rows, head, targets, scale, options, wanted)
            loss = (stats.weight * stats.nll).sum() * scale
        ctx.gradients, ctx.positions = gradients, positions
        ctx.like = [(one.shape, one.dtype) if one is not None else None for one in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_dft_loss has a first derivative only, and create_graph=True asks for more; use "
                "dft_loss on logits"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of linear_dft_loss was asked for a second time; it is computed with the loss "
                "and given away once, so call it again instead of keeping the graph"
            )
        (hidden, weight, bias), ctx.gradients = ctx.gradients, None
        like_hidden, like_weight, like_bias = ctx.like
        if hidden is not None:
            shape, dtype = like_hidden
            rows = scaled(hidden, grad, dtype)
            hidden = rows.new_zeros(shape).view(-1, shape[-1]).index_copy_(0, ctx.positions, rows).view(shape)
        if weight is not None:
            weight = scaled(weight, grad, like_weight[1])
        if bias is not None:
            bias = scaled(bias, grad, like_bias[1])
        return hidden, weight, bias, None, None, None, None, None


def run_tiles(
    rows: Tensor, head: Head, targets: Tensor, scale: Tensor, options: RowOptions, wanted: Wanted
) -> tuple[TokenStats, Gradients]:
    """Statistics of all rows, and the gradients of `scale * sum(w * nll)`, tile by tile.

    Args:
        rows: (tokens, hidden), in the precision of the products.
        targets: (tokens,) int64.
        scale: scalar, 1 / N.
        wanted: which gradients.

    Returns:
        stats: (tokens,) each. gradients: on rows, (tokens, hidden) in their dtype, but float16, which they
        may not reach yet; on weight and bias in float32 or wider, or rounded to their dtype; None where not
        wanted.
    """
    tokens = len(rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    row_scale, remaining, narrow = scale, None, rows.dtype
    if rows.dtype == torch.float16:
        row_scale = torch.full_like(scale, HALF_SCALE / max(1.0, abs(options.scale)))
        remaining, narrow = scale / row_scale, wide
    d_rows = torch.empty_like(rows, dtype=narrow) if wanted.hidden else None
    d_weight = None
    d_bias = rows.new_zeros(head.weight.shape[:1], dtype=wide) if wanted.bias else None
    parts: list[TokenStats] = []
    cut = tiles(tokens, head.weight.shape[0], wide.itemsize, rows.device.type)
    space = None
    if rows.device.type == "cpu" and cut:  # on a GPU torch's own allocator hands out the same memory again
        space = rows.new_empty(max(end - start for start, end in cut), head.weight.shape[0], dtype=wide)
    beside = rows.device.type == "cuda" and rows.dtype.itemsize < 4 and any(wanted)
    together = groups(cut, head.weight.shape[0] * rows.dtype.itemsize) if beside else [[one] for one in cut]
    for group in together:
        first, last = group[0][0], group[-1][1]
        gradient = rows.new_empty(last - first, head.weight.shape[0]) if beside else None
        for start, end in group:
            tile = wide_product(rows[start:end], head.weight, space)  # (rows, vocab)
            if head.bias is not None:
                tile += head.bias
            into = gradient[start - first : end - first] if beside else None
            stats, written = score_rows(
                tile, targets[start:end], row_scale if any(wanted) else None, options, into
            )
            parts.append(stats)
            if not beside:
                gradient = written
            del tile, written  # or the next tile would be made while this one is still held
        if gradient is not None and rows.dtype == torch.bfloat16:
            gradient = gradient.to(torch.bfloat16)
        if d_rows is not None:
            product(gradient, head.weight, d_rows[first:last])
        if wanted.weight:
            only = len(together) == 1 and head.dtype == rows.dtype
            d_weight = accumulated(d_weight, gradient, rows[first:last], only)
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=wide)
        del gradient
    for one in (d_rows, d_weight, d_bias):
        if one is not None and remaining is not None:
            one *= remaining
    if not tokens:
        d_weight = torch.zeros_like(head.weight) if wanted.weight else None
        empty = rows.new_zeros(0, dtype=wide)
        parts.append(TokenStats(empty, empty, empty, empty.bool(), empty, targets))
    stats = TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return stats, (d_rows, d_weight, d_bias)


def tiles(tokens: int, vocab: int, itemsize: int, device: str) -> list[tuple[int, int]]:
    """[start, end) of the rows of each tile: as few as keep it under `TILE_BYTES`, of about one size."""
    fit = max(1, TILE_BYTES.get(device, TILE_BYTES["cuda"]) // (vocab * itemsize))
    count = -(-tokens // fit)
    bounds = [tokens * index // count for index in range(count + 1)] if count else []
    return list(zip(bounds, bounds[1:], strict=False))


def groups(cut: list[tuple[int, int]], row_bytes: int) -> list[list[tuple[int, int]]]:
    """Tiles that follow one another, together as long as their rows keep under `GROUP_BYTES`."""
    made: list[list[tuple[int, int]]] = []
    for start, end in cut:
        if made and (end - made[-1][0][0]) * row_bytes <= GROUP_BYTES:
            made[-1].append((start, end))
        else:
            made.append([(start, end)])
    return made


# ---- products ----


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """In which precision the products are computed.

    Under autocast on a CPU that of the weight: logits are float32 there at any rate, so a copy of the weight
    in half precision would cost time and bring nothing.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and device != "cpu":
        return torch.get_autocast_dtype(device)
    return weight.dtype


def wide_product(rows: Tensor, weight: Tensor, space: Tensor | None) -> Tensor:
    """rows @ weight.T, (rows, vocab), accumulated and given in float32 or wider.

    A product that is rounded to bfloat16 is off by 0.06 where logits are about 20, which would go straight
    into the probability and so into the weight of the token.
    """
    if rows.dtype.itemsize < 4 and rows.device.type == "cuda":
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    made = None if space is None else space[: len(rows)]
    if rows.dtype.itemsize >= 4:
        return torch.mm(rows, weight.t(), out=made)
    rows = rows.float()  # there is no such product on a CPU
    for start, part in wide_blocks(weight):
        torch.mm(rows, part.t(), out=made[:, start : start + len(part)])
    return made


def product(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = gradient @ weight, (rows, hidden), in the precision of `out`."""
    if out.dtype == weight.dtype:
        torch.mm(gradient.to(weight.dtype), weight, out=out)
    elif out.device.type == "cuda":
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for start, part in wide_blocks(weight):
            out.addmm_(gradient[:, start : start + len(part)], part)


def wide_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A weight in half precision as float32, block by block in the same memory, each with its first row."""
    vocab, width = weight.shape
    step = min(max(1, BLOCK_BYTES // (4 * width)), vocab)
    block = weight.new_empty(step, width, dtype=torch.float32)
    for start in range(0, vocab, step):
        part = weight[start : start + step]
        yield start, block[: len(part)].copy_(part)


def accumulated(total: Tensor | None, gradient: Tensor, rows: Tensor, only: bool) -> Tensor:
    """total + gradient.T @ rows, (vocab, hidden), summed in float32 or wider.

    `only`: nothing is to be added, and the sum is wanted in bfloat16: it need not be widened to be narrowed.
    """
    on_gpu = rows.device.type == "cuda" and rows.dtype.itemsize < 4
    if gradient.dtype == torch.bfloat16 and (only or not on_gpu):
        part = torch.mm(gradient.t(), rows)  # summed in float32, then rounded
        if total is None:
            return part if only else part.float()
        for start, block in wide_blocks(part):
            total[start : start + len(block)] += block
        return total
    if total is None:
        options = {"out_dtype": torch.float32} if on_gpu else {}
        return torch.mm(gradient.t(), rows if on_gpu else rows.to(gradient.dtype), **options)
    if on_gpu:
        # A sum that is wider than the factors: older versions of torch refuse it.
        return torch.addmm(total, gradient.t(), rows, out_dtype=torch.float32, out=total)
    return total.addmm_(gradient.t(), rows.to(gradient.dtype))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in a dtype, in place where that is the same, and then not even read if it is 1."""
    on_cpu = gradient.device.type == "cpu"
    if on_cpu and factor.item() == 1:
        return gradient.to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if on_cpu or gradient.dtype == torch.float64:
        return gradient.mul_(factor)
    from dft.loss.kernels import scale_  # triton comes with CUDA builds of torch

    return scale_(gradient, factor)
