"""The DFT loss computed from hidden states, without ever materializing all logits.

The weight of a token is detached and depends on its own row of logits only, so the gradient on these logits,
w_t * (softmax - onehot) / N, can be computed as soon as the row is available. Rows are processed in tiles:
one product gives the logits of a tile, the statistics are computed from them, the gradient overwrites them,
and two more products propagate it to the hidden states and to the weight. Forward and backward together take
6 * N * D * V operations, compared with 8 * N * D * V if the backward recomputes the logits. The backward only
scales.
"""

from typing import Any

import torch
from torch import Tensor

from dft.labels import loss_positions
from dft.loss.dft import TokenStats, check_aligned, normalizer, times
from dft.loss.objectives import Objective, resolve_objective
from dft.loss.options import BaseHead, LossOptions
from dft.loss.products import product_dtype, scaled
from dft.loss.rows import LogitTransform, RowOptions
from dft.loss.tiles import HeadWeights, NeedsGrad, RowExtras, RowWeights, run_tiles


def linear_dft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = None,
    objective: Objective | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, TokenStats]:
    """Compute `dft_loss(logits, labels, ...)` for `logits = hidden @ weight.T + bias`, without the logits.

    Logits, statistics and the sum of the weight's gradient are float32 (float64 for float64 input),
    regardless of the dtype of the products. Under autocast the products are in its dtype, on a CPU in the
    weight's dtype. (On a CPU there is one more rounding: each tile's part of the gradient of a bfloat16
    weight is bfloat16.)

    Args:
        hidden: (batch, seq, hidden).
        weight: (vocab, hidden). Its gradient is computed only if it requires one.
        labels: (batch, seq), not shifted: hidden[:, t] predicts labels[:, t + 1]. Unsupervised: -100.
        alpha, objective: as of `dft_loss`.
        bias: (vocab,).
        logit_scale, logit_softcap: the logits are cap * tanh(scale * z / cap), or scale * z without a cap.
        **options: the other fields of `LossOptions`: `num_items`, `min_weight`, `loss_weight`, `base_logp`,
            `base` (a `BaseHead`), `shifted`, `positions`.

    Returns:
        (loss, stats) as `dft_loss`. The loss supports a first derivative only, computed once.

    Raises:
        ValueError: shapes that do not match, and the cases in which `dft_loss` raises it.
    """
    objective = resolve_objective(alpha, objective, options.get("base") is not None)
    transform = LogitTransform(logit_scale, logit_softcap)
    return fused_loss(hidden, weight, bias, labels, transform, LossOptions(objective, **options))


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    options: LossOptions,
) -> tuple[Tensor, TokenStats]:
    """Compute `linear_dft_loss` from a single options object."""
    base = options.base
    if isinstance(base, Tensor):
        raise ValueError("base must be a BaseHead for the fused loss, got a tensor of logits")
    _check_shapes(hidden, weight, bias, labels, base)
    _check_options(labels, options)
    positions = options.positions
    if positions is None:
        positions = loss_positions(labels, options.shifted)
    target_positions = positions if options.shifted else positions + 1
    targets = labels.flatten()[target_positions]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    base_logp = options.base_logp if options.objective.needs_base_logp else None
    weights = RowWeights(
        *(
            None if values is None else values.flatten()[target_positions]
            for values in (options.min_weight, options.loss_weight, base_logp)
        )
    )
    count = normalizer(options.num_items, targets)
    # Filled on the device, because copying a number to it would synchronize.
    scale = (torch.ones((), dtype=wide, device=hidden.device) / count).to(wide)
    needs = NeedsGrad(*(_needs_grad(tensor) for tensor in (hidden, weight, bias)))
    rows = RowOptions(options.objective, *transform)
    loss, *stats = _LinearDFT.apply(
        hidden, weight, bias, positions, targets, scale, rows, needs, weights, base
    )
    return loss, TokenStats(*stats)


def _check_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, base: BaseHead | None
) -> None:
    """Raise ValueError if the shapes do not match."""
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or weight.shape[1:] != hidden.shape[2:]:
        raise ValueError(
            "hidden must be (batch, seq, hidden), labels (batch, seq) and weight (vocab, hidden), got "
            f"{tuple(hidden.shape)}, {tuple(labels.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (vocab,), got {tuple(bias.shape)} with {weight.shape[0]} tokens")
    if base is not None and (base.hidden.shape[:2] != labels.shape or len(base.weight) != len(weight)):
        raise ValueError(
            f"the base's hidden must be (batch, seq, hidden) and its weight (vocab, hidden), got "
            f"{tuple(base.hidden.shape)} and {tuple(base.weight.shape)} for a weight of "
            f"{tuple(weight.shape)}"
        )


def _check_options(labels: Tensor, options: LossOptions) -> None:
    """Raise ValueError if the shape of an option does not match the labels."""
    count = options.num_items
    if isinstance(count, Tensor) and count.ndim:
        raise ValueError(f"num_items must be a scalar, got a tensor of shape {tuple(count.shape)}")
    check_aligned("min_weight", options.min_weight, labels)
    check_aligned("loss_weight", options.loss_weight, labels)
    check_aligned("base_logp", options.base_logp, labels)


def _needs_grad(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


class _LinearDFT(torch.autograd.Function):
    """Return (loss, *TokenStats); only the loss has a gradient."""

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
        needs: NeedsGrad,
        weights: RowWeights,
        base: BaseHead | None,
    ) -> tuple[Tensor | None, ...]:
        dtype = product_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = selected(hidden, positions, dtype)
            head = HeadWeights(
                weight.detach().to(dtype), None if bias is None else bias.detach(), weight.dtype
            )
            extras = RowExtras(weights)
            if base is not None:
                base_head = HeadWeights(base.weight.to(dtype), base.bias, base.weight.dtype)
                extras = RowExtras(weights, selected(base.hidden, positions, dtype), base_head)
            stats, gradients = run_tiles(rows, head, targets, scale, options, needs, extras)
            total = (stats.weight * stats.nll).sum()
            if base is not None:
                total += options.objective.kl_weight * times(stats.kl, weights.loss).sum()
            loss = total * scale
        ctx.gradients, ctx.positions = gradients, positions
        ctx.shape = hidden.shape
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*(column for column in stats if column is not None))
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_dft_loss supports a first derivative only, but create_graph=True requires a second; "
                "use dft_loss on logits"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of linear_dft_loss was requested a second time; it is computed with the loss "
                "and released after the first backward, so call linear_dft_loss again instead of retaining "
                "the graph"
            )
        (hidden, weight, bias), ctx.gradients = ctx.gradients, None
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if hidden is not None:
            rows = scaled(hidden, grad, hidden_dtype)
            flat = rows.new_zeros(ctx.shape).view(-1, ctx.shape[-1])
            hidden = flat.index_copy_(0, ctx.positions, rows).view(ctx.shape)
        if weight is not None:
            weight = scaled(weight, grad, weight_dtype)
        if bias is not None:
            bias = scaled(bias, grad, bias_dtype)
        return hidden, weight, bias, None, None, None, None, None, None, None


def selected(hidden: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (tokens, hidden) hidden states at the given flat positions, converted to `dtype`."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).to(dtype)
