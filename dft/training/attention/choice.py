"""Decide whether a model runs with `varlen` attention, and switch models between implementations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import is_flash_attention_requested

from dft.training.attention.blocks import WrittenOutBlocks
from dft.training.attention.interface import VARLEN, layer_types
from dft.training.attention.sequences import sequence_attention

MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types whose only access to other tokens is through the attention mask."""
DROPOUT_SETTINGS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
"""Names that architectures have for the dropout of attention."""
MASKED_WINDOWS = ("phimoe", "qwen2_moe")
"""Architectures of transformers 5.23 whose sliding windows are in the mask alone."""
HEAD_SIZES = ("head_dim", "qk_head_dim", "v_head_dim")
"""Settings for the size of a head; those of multi-head latent attention differ in queries and values."""
LARGEST_HEAD = 256
"""Largest head size of flash attention on CUDA."""
PROBE_LENGTHS = (5, 33)
"""Tokens of the sequences of the check of the operator."""


def runs_unpadded(config: PretrainedConfig) -> bool:
    """Return whether the attention of a model takes batches of concatenated sequences."""
    return config._attn_implementation == VARLEN or is_flash_attention_requested(config)


def layers_obstacle(config: PretrainedConfig) -> str | None:
    """Return the reason why a mask or boundaries cannot keep sequences apart in all layers, or None."""
    others = sorted(layer_types(config) - MASKED_LAYERS)
    return f"it has layers that are not plain attention ({', '.join(others)})" if others else None


def varlen_obstacle(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why a model cannot run with `varlen` attention, or None.

    Args:
        model: the model.
        dtype: dtype that attention computes in.
        device: device that it runs on.
    """
    model = unwrap_peft_model(model)
    config = model.config.get_text_config()
    settings = config.to_dict()
    if "chunked_attention" in layer_types(config):
        return "its attention is chunked"
    if (obstacle := layers_obstacle(config)) is not None:
        return obstacle
    # Models that run with flash attention are those that need no mask beyond causality and windows.
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return "its attention cannot be replaced"
    if dropout := max((settings.get(name) or 0.0 for name in DROPOUT_SETTINGS), default=0.0):
        return f"it has a dropout of {dropout} in its attention"
    if config.model_type in MASKED_WINDOWS and settings.get("sliding_window"):
        return "only its mask implements its sliding window"
    return _device_obstacle(config, dtype, device)


def _device_obstacle(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why the operator does not run on a device, or None. Runs it once."""
    settings = config.to_dict()
    heads = config.num_attention_heads
    size = largest_head(config)
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for the device {device.type}"
    if device.type == "cuda":
        if dtype not in (torch.bfloat16, torch.float16):
            return "on a GPU it computes in bfloat16 or float16 only"
        if settings.get("attn_logit_softcapping"):
            return "its attention caps the scores, which torch has no kernel for on a GPU"
        if size > LARGEST_HEAD or size % 8:
            return (
                f"its heads have {size} entries, and torch's kernel takes multiples of 8 up to {LARGEST_HEAD}"
            )
    try:
        error = operator_error(heads, settings.get("num_key_value_heads") or heads, size, dtype, device)
    except RuntimeError as failure:  # an old GPU, or a build of torch without the kernel
        return f"torch's kernel does not run here: {str(failure).splitlines()[0]}"
    if not error <= 10 * torch.finfo(dtype).eps:  # NaN is an error as well
        return f"torch's kernel is not exact here: relative error {error:.2g} in {dtype}"
    return None


def largest_head(config: PretrainedConfig) -> int:
    """Return the number of entries of the largest head of queries or values in any layer."""
    settings = config.to_dict()
    layers = [settings, *(settings.get("per_layer_config") or {}).values()]
    sizes = [layer.get(name) or 0 for layer in layers for name in HEAD_SIZES]
    return max(sizes) or config.hidden_size // config.num_attention_heads


def operator_error(heads: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative error of the operator's output and gradients on two short sequences.

    They are compared with attention written out in float64 on the CPU. Does not consume random numbers.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(PROBE_LENGTHS)

    def normal(count: int) -> Tensor:
        numbers = torch.randn((tokens, count, size), generator=generator, dtype=torch.float64)
        return numbers.to(dtype)

    inputs, grad = [normal(heads), normal(key_heads), normal(key_heads)], normal(heads)
    bounds = torch.tensor([0, PROBE_LENGTHS[0], tokens], dtype=torch.int32, device=device)
    actual = [tensor.to(device).requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output, _ = sequence_attention(*actual, None, bounds, max(PROBE_LENGTHS), size**-0.5, 0, 0.0)
        output.backward(grad.to(device))
    results = [output, *(tensor.grad for tensor in actual)]
    expected = _written_out(inputs, grad, key_heads, size**-0.5)
    errors = [
        (result.detach().cpu().double() - value).norm() / value.norm()
        for result, value in zip(results, expected, strict=True)
    ]
    return torch.stack(errors).max().item()


def _written_out(inputs: list[Tensor], grad: Tensor, key_heads: int, scale: float) -> list[Tensor]:
    """Return the output and the gradients of the sequences of `operator_error`, in float64."""
    kernel = WrittenOutBlocks(scale, softcap=0.0)
    parts: list[list[Tensor]] = [[], [], [], []]
    for part in zip(*(tensor.double().split(PROBE_LENGTHS) for tensor in (*inputs, grad)), strict=True):
        q, k, v, g = (tensor.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3) for tensor in part)
        output, lse = kernel.forward(q, k, v, None)
        dq, dk, dv = kernel.backward(g, q, k, v, output, lse, None)
        results = (output, dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True))
        for values, result in zip(parts, results, strict=True):
            values.append(result.permute(2, 0, 1, 3).flatten(1, 2))
    return [torch.cat(values) for values in parts]


def reference_attention(model: PreTrainedModel) -> str:
    """Return the implementation that transformers chooses for a model: sdpa, or eager if it must."""
    return unwrap_peft_model(model).get_correct_attn_implementation(None)


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run a model with another attention implementation in this context."""
    model = unwrap_peft_model(model)
    previous = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
