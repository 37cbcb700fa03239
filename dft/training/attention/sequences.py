"""Causal attention over concatenated sequences, as an operator with a gradient.

On the CPU each sequence is one call of the kernel, so nothing is computed for padding or for pairs of tokens
of different sequences. With a sliding window, the queries of a long sequence are divided into blocks that
read only the keys within the window, which makes the time linear in the length of the sequence. On CUDA the
variable-length flash attention of torch processes all sequences at once.

The operator is opaque to torch.compile: it neither breaks the graph nor is it compiled again when the number
or the lengths of the sequences change.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen  # registers the operators of torch that are used on CUDA  # noqa: F401

from dft.training.attention.blocks import choose_blocks

SMALLEST_BLOCK = 128
"""Least number of queries in a block, so that small windows do not make many small matrix products."""
WRITTEN_OUT_BLOCK = 512
"""Number of queries in a block whose scores are stored."""


@torch.library.custom_op("dft::sequence_attention", mutates_args=())
def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    bounds: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend causally within each sequence.

    Args:
        query: (tokens, heads, head size).
        key, value: (tokens, key heads, head size); consecutive heads of queries share a head.
        sinks: (heads,) learned scores that take part in the softmax without a value (attention sinks,
            arXiv 2508.10925); None for none.
        bounds: (sequences + 1,) int32, first token of each sequence, then the number of tokens.
        longest: number of tokens of the longest sequence.
        scale: factor of the scores.
        window: number of tokens that a token sees, itself included; 0 for all before it.
        softcap: bound of the scores, see `WrittenOutBlocks`; 0 for none.

    Returns:
        (output, lse): like the query; and the log-sum-exp of the scores, (heads, tokens).
    """
    if query.is_cuda:
        left = window - 1 if window else -1
        output, lse, _ = torch.ops.torch_attn._varlen_attn(
            query, key, value, bounds, bounds, longest, longest, True, scale, [left, 0],
            query.shape[1] != key.shape[1],
        )  # fmt: skip
    else:
        output, lse = _forward_on_cpu(query, key, value, bounds.tolist(), scale, window, softcap)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        output = (output * (lse - total).exp().T[..., None]).to(output.dtype)
        lse = total
    return output.contiguous(), lse.contiguous()


@sequence_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, bounds: Tensor, longest: int,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=dtype)


@torch.library.custom_op("dft::sequence_attention_backward", mutates_args=())
def sequence_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    bounds: Tensor,
    output: Tensor,
    lse: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and sinks; that of the sinks is empty without sinks.

    With sinks, `output` and `lse` include them, so that the recomputed probabilities do as well.
    """
    grad_sinks = query.new_empty(0)
    if sinks is not None:
        total = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)  # (tokens, heads)
        probabilities = (sinks[:, None].to(lse.dtype) - lse).exp()  # (heads, tokens)
        grad_sinks = -(probabilities * total.T).sum(-1).to(sinks.dtype)
    if query.is_cuda:
        left = window - 1 if window else -1
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which is not used
        gradients = torch.ops.torch_attn._varlen_attn_backward(
            grad, query, key, value, output, lse, bounds, bounds, longest, longest, True, state, scale,
            [left, 0],
        )  # fmt: skip
    else:
        gradients = _backward_on_cpu(
            grad, query, key, value, output, lse, bounds.tolist(), scale, window, softcap
        )
    grad_query, grad_key, grad_value = (gradient.contiguous() for gradient in gradients)
    return grad_query, grad_key, grad_value, grad_sinks


@sequence_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, bounds: Tensor,
    output: Tensor, lse: Tensor, longest: int, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    grad_query, grad_key, grad_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return grad_query, grad_key, grad_value, grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, bounds, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, sinks, bounds, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once, as gradient checkpointing demands
    *gradients, grad_sinks = sequence_attention_backward(grad, *saved, *ctx.settings)
    return (*gradients, None if saved[3] is None else grad_sinks, *[None] * 5)


sequence_attention.register_autograd(_backward, setup_context=_setup_context)


def _forward_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return (output, lse) as `sequence_attention` does without sinks."""
    kernel = choose_blocks(scale, softcap)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=dtype)
    groups, lse_groups = key.shape[1], lse.unflatten(0, (key.shape[1], -1))
    for queries, keys, visible in _blocks(bounds, window, bool(softcap)):
        q = _per_group(query[queries], groups)
        k, v = (_shared(tensor[keys], q.shape[1]) for tensor in (key, value))
        block, block_lse = kernel.forward(q, k, v, visible)
        _per_group(output[queries], groups).copy_(block)
        lse_groups[..., queries] = block_lse
    return output, lse


def _backward_on_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    kernel = choose_blocks(scale, softcap)
    contiguous = torch.contiguous_format
    grad_query = torch.empty_like(query, memory_format=contiguous)
    grad_key, grad_value = (torch.zeros_like(tensor, memory_format=contiguous) for tensor in (key, value))
    groups, lse_groups = key.shape[1], lse.unflatten(0, (key.shape[1], -1))
    for queries, keys, visible in _blocks(bounds, window, bool(softcap)):
        q, g, o = (_per_group(tensor[queries], groups) for tensor in (query, grad, output))
        k, v = (_shared(tensor[keys], q.shape[1]) for tensor in (key, value))
        dq, dk, dv = kernel.backward(g, q, k, v, o, lse_groups[..., queries].contiguous(), visible)
        _per_group(grad_query[queries], groups).copy_(dq)
        grad_key[keys].transpose(0, 1).add_(dk.sum(1))
        grad_value[keys].transpose(0, 1).add_(dv.sum(1))
    return grad_query, grad_key, grad_value


def _blocks(
    bounds: Sequence[int], window: int, stores_scores: bool
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield blocks of queries, the keys that they may see, and which of these each of them sees.

    A block is a whole sequence, unless a window hides a part of it or its scores would be stored.

    Yields:
        (queries, keys, visible): slices of tokens; (queries, keys) bool, or None for causal attention within
        one sequence or its beginning.
    """
    size = max(window, SMALLEST_BLOCK) if window else WRITTEN_OUT_BLOCK
    if stores_scores:
        size = min(size, WRITTEN_OUT_BLOCK)
    longest = min(window or sys.maxsize, WRITTEN_OUT_BLOCK if stores_scores else sys.maxsize)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end == start:
            continue
        if end - start <= longest:
            yield slice(start, end), slice(start, end), None
            continue
        for first in range(start, end, size):
            last = min(first + size, end)
            begin = max(start, first - window + 1) if window else start
            distance = torch.arange(first, last)[:, None] - torch.arange(begin, last)
            visible = (distance >= 0) & (distance < window) if window else distance >= 0
            yield slice(first, last), slice(begin, last), visible


def _per_group(tensor: Tensor, groups: int) -> Tensor:
    """View (tokens, heads, size) as (key heads, group, tokens, size)."""
    return tensor.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _shared(tensor: Tensor, group: int) -> Tensor:
    """View (tokens, key heads, size) as (key heads, group, tokens, size), the same for each of a group."""
    return tensor.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
