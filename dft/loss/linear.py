"""The DFT loss straight from hidden states: the logits are never all there.

The weight of a token is detached and depends on its own row alone, so the gradient on the logits,
w_t * (softmax - onehot) / N, is known as soon as the row is. Rows are taken in tiles: one product gives their
logits, the statistics come from these, the logits make room for their gradient, and two products carry it to
the hidden states and to the weight. That is 6 * N * D * V operations for forward and backward, where keeping
no logits otherwise means computing them twice (8 * N * D * V). The backward only scales.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dft.labels import loss_positions
from dft.loss.dft import TokenStats, chosen_objective, normalizer
from dft.loss.objectives import Objective
from dft.loss.products import accumulated, product, product_dtype, scaled, wide_product
from dft.loss.rows import RowOptions, score_rows_torch

TILE_BYTES = {"cpu": 384 * 2**20, "cuda": 1024 * 2**20}
"""What one tile of logits may take, whatever batch and vocabulary are, as long as a single row fits. Of large
tiles the products are efficient, and the weight's gradient is read and written less often."""
GROUP_BYTES = 2 * 2**30
"""What the gradient of some tiles may take in half precision on a GPU, where it is written beside the logits.
One product for all of them sums the weight's gradient in float32 without ever holding it so; with more than
one group the sum is held, and read and written for each."""
HALF_SCALE = 2.0**14
"""float16 ends at 6e-8, above most gradients, and at 65,504. Those of a row sum to at most 2 before they are
divided by N, so they are written this much larger, and divided afterwards in float32."""
LARGEST_GAP = 64.0
"""Nats by which a model may exceed its base at a token before the gradient of the divergence, which that gap
multiplies, leaves float16."""


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


class Base(NamedTuple):
    """What a frozen base model has in front of its head, and the head. Detached.

    hidden: (batch, seq, its hidden). weight: (vocab, its hidden). bias: (vocab,) or None. Its logits are made
    of the product as those of the model are.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Beside(NamedTuple):
    """What else is known of each supervised token. min_weight: (tokens,). base_rows: (tokens, its hidden), in
    the precision of the products, with base_head."""

    min_weight: Tensor | None = None
    base_rows: Tensor | None = None
    base_head: Head | None = None


NOTHING = Beside()

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_dft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = None,
    objective: Objective | None = None,
    num_items: Tensor | float | None = None,
    min_weight: Tensor | None = None,
    base: Base | None = None,
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
        alpha, objective, min_weight: as `dft_loss` takes them.
        num_items: N, the supervised tokens of the whole optimizer step. Default: those of this batch.
        base: the frozen base model, for an objective with a `kl_weight`.
        bias: (vocab,).
        logit_scale, logit_softcap: the logits are cap * tanh(scale * z / cap), or scale * z without a cap.
        positions: (tokens,) int64, where labels[:, t + 1] is supervised as b * seq + t, ascending. Given, the
            host need not wait for the device to count them.
        shifted: whether hidden[:, t] predicts labels[:, t], and positions say so, too.

    Returns:
        (loss, stats) as `dft_loss` does. The loss has a first derivative only, to be asked for once.

    Raises:
        ValueError: shapes that do not fit, and what `dft_loss` refuses.
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
    if base is not None and (base.hidden.shape[:2] != labels.shape or len(base.weight) != len(weight)):
        raise ValueError(
            f"the base's hidden must be (batch, seq, hidden) and its weight (vocab, hidden), got "
            f"{tuple(base.hidden.shape)} and {tuple(base.weight.shape)} beside {tuple(weight.shape)}"
        )
    chosen = chosen_objective(alpha, objective, base is not None)
    if positions is None:
        positions = loss_positions(labels, shifted)
    at = positions if shifted else positions + 1
    targets = labels.flatten()[at]
    floor = None
    if min_weight is not None:
        if min_weight.shape != labels.shape:
            raise ValueError(
                f"min_weight must be (batch, seq) as the labels, got {tuple(min_weight.shape)} and "
                f"{tuple(labels.shape)}"
            )
        floor = min_weight.flatten()[at]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = normalizer(num_items, targets)
    # Filled on the device: to copy a number there would wait for it.
    scale = (torch.ones((), dtype=wide, device=hidden.device) / count).to(wide)
    wanted = Wanted(
        *(torch.is_grad_enabled() and one is not None and one.requires_grad for one in (hidden, weight, bias))
    )
    options = RowOptions(chosen, logit_scale, logit_softcap)
    loss, *stats = _LinearDFT.apply(
        hidden, weight, bias, positions, targets, scale, options, wanted, floor, base
    )
    return loss, TokenStats(*stats)


class _LinearDFT(torch.autograd.Function):
    """(loss, *TokenStats); all but the loss are detached."""

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
        min_weight: Tensor | None,
        base: Base | None,
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        dtype = product_dtype(hidden, weight)
        with torch.autocast(device, enabled=False):
            rows = selected(hidden, positions, dtype)
            head = Head(weight.detach().to(dtype), None if bias is None else bias.detach(), weight.dtype)
            known = Beside(min_weight)
            if base is not None:
                base_head = Head(base.weight.to(dtype), base.bias, base.weight.dtype)
                known = Beside(min_weight, selected(base.hidden, positions, dtype), base_head)
            stats, gradients = run_tiles(rows, head, targets, scale, options, wanted, known)
            total = (stats.weight * stats.nll).sum()
            if base is not None:
                total += options.objective.kl_weight * stats.kl.sum()
            loss = total * scale
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
        return hidden, weight, bias, None, None, None, None, None, None, None


def selected(hidden: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, hidden) of the hidden states at some positions, in the precision of the products."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).to(dtype)


def run_tiles(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    scale: Tensor,
    options: RowOptions,
    wanted: Wanted,
    known: Beside = NOTHING,
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
        room = max(1.0, abs(options.scale)) * (1 + LARGEST_GAP * options.objective.kl_weight)
        row_scale = torch.full_like(scale, HALF_SCALE / room)
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
            floor = None if known.min_weight is None else known.min_weight[start:end]
            log_base = None
            if known.base_head is not None:
                log_base = log_probabilities(known.base_rows[start:end], known.base_head, options)
            stats, written = score_rows(
                tile, targets[start:end], row_scale if any(wanted) else None, options, into, floor, log_base
            )
            parts.append(stats)
            if not beside:
                gradient = written
            del tile, written, log_base  # or the next tile would be made while this one is still held
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
        parts.append(TokenStats(empty, empty, empty, empty.bool(), empty, targets, empty))
    stats = TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return stats, (d_rows, d_weight, d_bias)


def log_probabilities(rows: Tensor, head: Head, options: RowOptions) -> Tensor:
    """(rows, vocab) of a head, in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    space = rows.new_empty(len(rows), len(head.weight), dtype=wide) if rows.device.type == "cpu" else None
    z = wide_product(rows, head.weight, space)
    if head.bias is not None:
        z += head.bias
    z *= options.scale
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    z -= z.amax(1, keepdim=True)  # before it is rounded at the size of the logits
    return z.sub_(z.logsumexp(1, keepdim=True))


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


def score_rows(
    tile: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    options: RowOptions,
    into: Tensor | None = None,
    min_weight: Tensor | None = None,
    log_base: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of rows of a head's output, and the gradient of `row_scale * sum(w * nll)` on it.

    With a base model that of `row_scale * sum(w * nll + kl_weight * kl)`.

    Args:
        tile: (rows, vocab), float32 or wider. It is overwritten.
        targets: (rows,) int64.
        row_scale: scalar; None for statistics alone.
        into: (rows, vocab) in half precision on a GPU, where the gradient is written; else it overwrites the
            tile, as on a CPU, whose products that sum in float32 want it there.
        min_weight: (rows,) the least each may weigh.
        log_base: (rows, vocab) log-probabilities of the base model, in the tile's dtype. Overwritten.

    Returns:
        stats: (rows,) each, what is no bool and no id in the tile's dtype. gradient: (rows, vocab), or None.
    """
    if tile.is_cuda and tile.dtype == torch.float32 and log_base is None:
        from dft.loss.kernels import score_rows as score_rows_triton  # triton comes with CUDA builds of torch

        return score_rows_triton(tile, targets, row_scale, options, into, min_weight)
    stats, gradient = score_rows_torch(tile, targets, row_scale, options, min_weight, log_base)
    if gradient is not None and into is not None:
        gradient = into.copy_(gradient)
    return stats, gradient
