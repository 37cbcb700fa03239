"""Attention without padding for every transformers model: the implementation named `varlen`.

transformers calls an attention implementation with the projected queries, keys and values, and builds the
mask that it asks for (https://huggingface.co/docs/transformers/en/attention_interface). This one asks for no
mask for batches without padding and computes each sequence on its own. `FlatCollator` passes the boundaries
of the sequences; if a batch has none, they are where the positions restart, and at the start of each row.
Batches with padding or with a cache, as in generation, get the mask of sdpa.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dft.training.attention.sequences import sequence_attention

VARLEN = "varlen"
"""Name of the implementation, for `attn_implementation`."""


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a layer of a transformers model.

    Args:
        module: the attention layer.
        query: (batch, heads, queries, head size).
        key, value: (batch, key heads, keys, head size); the size of a value may differ.
        attention_mask: (batch, 1, queries, keys), if the batch has padding.
        dropout: must be 0.
        scaling: factor of the scores; by default 1 / sqrt(head size).
        sliding_window: number of tokens that a token sees, itself included.
        softcap: bound of the scores.
        s_aux: (heads,) attention sinks.
        is_causal: whether a token sees only the tokens before it; by default what the layer says.
        position_ids: (1 or batch, queries) positions, which restart with each sequence.
        cu_seq_lens_q: (sequences + 1,) int32, cumulative lengths of the sequences of a flattened batch.
        max_length_q: length of the longest of them.
        position_bias: numbers to add to the scores, which are not supported.
        kwargs: other arguments of transformers; unused.

    Returns:
        (output, None): (batch, queries, heads, value size).

    Raises:
        ValueError: the model uses dropout or a position bias.
    """
    if dropout or position_bias is not None:
        feature = "dropout of attention" if dropout else "a position bias"
        raise ValueError(f"{VARLEN} attention does not support {feature}; use attn_implementation='sdpa'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # not every layer says it
    rows, _, length, _ = query.shape
    if attention_mask is not None or not causal or key.shape[2] != length:
        output = _masked_attention(module, query, key, value, attention_mask, scale, softcap, s_aux, causal)
        return output, None
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _bounds(position_ids, rows, length, query.device)
    settings = (cu_seq_lens_q, max_length_q, scale, sliding_window or 0, softcap or 0.0)
    return _unpadded_attention(query, key, value, s_aux, settings), None


def varlen_mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: Tensor | None = None,
    config: PretrainedConfig | None = None, use_vmap: bool = False, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Return the mask that `varlen_attention_forward` needs: none for batches without padding and cache.

    A model that changes causal attention in its own way (`use_vmap`) or attends within chunks gets the mask.
    The arguments are those of `transformers.masking_utils.sdpa_mask`.
    """
    chunked = config is not None and "chunked_attention" in layer_types(config)
    if attention_mask is None and q_length == kv_length and not use_vmap and not chunked:
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, attention_mask=attention_mask, config=config, use_vmap=use_vmap,
        **kwargs,
    )  # fmt: skip


def layer_types(config: PretrainedConfig) -> set[str]:
    """Return the types of the layers of a model; none if its configuration does not name them."""
    return set(getattr(config, "layer_types", None) or ())  # not every configuration has the attribute


def _unpadded_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: tuple[Any, ...]
) -> Tensor:
    """Return the attention of a batch without padding, (batch, queries, heads, value size).

    Args:
        settings: the arguments of `sequence_attention` from `bounds` on.
    """
    if torch.is_autocast_enabled(query.device.type):  # casts the inputs of PyTorch's own operators itself
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, heads, length, _ = query.shape
    value_size = value.shape[-1]
    size = max(query.shape[-1], value_size)  # the operator takes one size; zeros add nothing to a product
    padded = (
        F.pad(tensor, [0, size - tensor.shape[-1]]) if tensor.shape[-1] < size else tensor
        for tensor in (query, key, value)
    )
    flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in padded)
    output, _ = sequence_attention(*flat, sinks, *settings)
    return output.view(rows, length, heads, size)[..., :value_size]


def _bounds(position_ids: Tensor | None, rows: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the boundaries of the sequences of a batch without padding, and the length of the longest."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return torch.arange(rows + 1, dtype=torch.int32, device=device) * length, length
    starts = position_ids.expand(rows, -1).diff(dim=1, prepend=position_ids[:, :1].expand(rows, 1)) != 1
    starts[:, 0] = True
    firsts = starts.flatten().nonzero().squeeze(1)
    bounds = F.pad(firsts, (0, 1), value=rows * length).int()
    return bounds, int(bounds.diff().max())


def _masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return the attention of a batch with padding or with a cache, (batch, queries, heads, value size)."""
    if softcap is None and sinks is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, mask, scaling=scale, is_causal=causal and mask is None)[0]
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = mask.tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        # A row of padding sees nothing; finite numbers give it a mean of the values instead of NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        probabilities = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return (probabilities.to(value.dtype) @ value).transpose(1, 2)


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)
