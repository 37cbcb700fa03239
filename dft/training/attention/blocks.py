"""Exact causal attention of one block of queries: through torch's kernel for the CPU, or written out.

Both compute `softmax(scale * q k^T) v` and the logarithm of the sum of the exponentials, from which the
backward pass recomputes the probabilities (FlashAttention, arXiv 2205.14135, algorithm 4). Tensors have the
shape (key heads, queries per key head, tokens, head size); the queries of a group share a key head, so keys
and values have stride 0 in the second dimension and are never copied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of queries, keys and values. Those of keys and values are per query head, not yet summed."""


@dataclass(frozen=True)
class CpuBlocks:
    """The flash attention kernel that torch uses for `scaled_dot_product_attention` on the CPU.

    Attributes:
        scale: factor of the scores.
    """

    scale: float

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output and the log-sum-exp of the scores.

        Args:
            query: (key heads, group, queries, head size).
            key, value: (key heads, group, keys, head size).
            visible: (queries, keys) bool, the keys that each query sees; None for causal attention, with as
                many keys as queries.

        Returns:
            (output, lse): like the query; and (key heads, group, queries), at least float32.
        """
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, visible is None, attn_mask=_additive(visible, query), scale=self.scale
        )

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        visible: Tensor | None,
    ) -> Gradients:
        """Return the gradients, each with the shape of its tensor."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, lse, 0.0, visible is None,
            attn_mask=_additive(visible, query), scale=self.scale,
        )  # fmt: skip


@dataclass(frozen=True)
class WrittenOutBlocks:
    """Attention written out in torch, for models that cap the scores: no kernel for the CPU does.

    Attributes:
        scale: factor of the scores.
        softcap: c in `c * tanh(score / c)` (Gemma 2, arXiv 2408.00118, section 2); 0 for no cap.
    """

    scale: float
    softcap: float

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output and the log-sum-exp of the scores, see `CpuBlocks.forward`."""
        scores = self._scores(query, key, visible)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp()
        return (probabilities @ value.to(scores.dtype)).to(query.dtype), lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        visible: Tensor | None,
    ) -> Gradients:
        """Return the gradients, each with the shape of its tensor."""
        scores = self._scores(query, key, visible)
        probabilities = (scores - lse[..., None]).exp()
        grad, output = grad.to(scores.dtype), output.to(scores.dtype)
        total = (grad * output).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad @ value.to(scores.dtype).transpose(-1, -2) - total)
        if self.softcap:
            # d tanh(x) = 1 - tanh(x)^2; hidden scores are -inf, and their probability is 0.
            capped = scores.masked_fill(scores.isinf(), 0.0)
            grad_scores = grad_scores * (1 - (capped / self.softcap) ** 2)
        grad_scores = grad_scores * self.scale
        grad_query = grad_scores @ key.to(scores.dtype)
        grad_key = grad_scores.transpose(-1, -2) @ query.to(scores.dtype)
        grad_value = probabilities.transpose(-1, -2) @ grad
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)

    def _scores(self, query: Tensor, key: Tensor, visible: Tensor | None) -> Tensor:
        """Return the capped scores, at least float32, (key heads, group, queries, keys), hidden ones -inf."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if visible is None:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores.masked_fill(~visible, -torch.inf)


Blocks = CpuBlocks | WrittenOutBlocks


def choose_blocks(scale: float, softcap: float) -> Blocks:
    """Return the implementation for the CPU. A `softcap` of 0 means that the scores are not capped."""
    return WrittenOutBlocks(scale, softcap) if softcap else CpuBlocks(scale)


def _additive(visible: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask as numbers to add to the scores."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
