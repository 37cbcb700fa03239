"""Sizes, shapes and precision of model parameters, whether or not ZeRO-3 shards them."""

import re

import torch
import transformers
import xxhash
from torch import nn
from transformers import PreTrainedModel

GIB = 2**30
EVERY_WEIGHT_USED = frozenset({
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "gemma3", "glm4_moe",
    "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "jamba", "llama4_text",
    "minimax", "minimax_m2", "mistral3", "mixtral", "olmoe", "phimoe", "qwen2_5_vl", "qwen2_moe", "qwen3_5",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
})  # fmt: skip
"""Mixtures of experts and multimodal models of transformers 5.23 in which each weight of the text part gets a
gradient from every text. The weights of all experts of a layer are one parameter there.

Others have weights that no text reaches, such as indexers of sparse attention, cross-attention to images, and
experts where all tokens may be sent to one that computes nothing.
"""
CROSS_ATTENTION = re.compile(r"\.(encoder_attn|crossattention)(_layer_norm)?\.")
"""Matches weights of cross-attention, which have no gradient if a decoder (Bart) is trained alone."""


def is_partitioned(model: nn.Module) -> bool:
    """Return whether ZeRO-3 has partitioned weights of a model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def element_count(parameter: nn.Parameter) -> int:
    """Return the number of elements of a full parameter, even if ZeRO-3 has partitioned it."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def element_dims(parameter: nn.Parameter) -> int:
    """Return the number of dimensions of a full parameter, even if ZeRO-3 has flattened it."""
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.dim()


def shapes_digest(model: nn.Module) -> str:
    """Return a digest of the names and shapes of a model's weights."""
    lines = sorted(
        f"{name} {list(parameter.ds_shape if hasattr(parameter, 'ds_shape') else parameter.shape)}\n"
        for name, parameter in model.named_parameters()
    )
    return xxhash.xxh3_64_hexdigest("".join(lines).encode())


def compute_dtype(args: transformers.TrainingArguments, model: PreTrainedModel) -> torch.dtype:
    """Return the dtype with the rounding of the model's matrix products. TF32 rounds about like float16."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16 or (args.tf32 and model.dtype == torch.float32):
        return torch.float16
    return model.dtype


def freeze_unused_parts(model: PreTrainedModel) -> list[str]:
    """Freeze the parts of a multimodal model that text does not reach. Return their names.

    They never get a gradient. DeepSpeed would apply weight decay to them all the same, and FSDP could not
    resume an optimizer without a state for them.
    """
    if model.config.get_text_config() is model.config:
        return []
    used = _text_weights(model)
    names = set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
            names.add(name.removeprefix(f"{model.base_model_prefix}.").split(".")[0])
    return sorted(names)


def resolve_find_unused_parameters(
    model: PreTrainedModel, training: transformers.TrainingArguments
) -> bool | None:
    """Return whether DDP has to look for parameters without a gradient; None leaves it to transformers.

    transformers lets DDP search in every model. That costs time in each micro-batch, and each rank warns if
    all parameters have a gradient. Without the search, a parameter that has none is an error.
    """
    configured = training.ddp_find_unused_parameters
    if configured is None and _uses_every_weight(model):
        return False
    return configured


def _uses_every_weight(model: PreTrainedModel) -> bool:
    """Return whether every trained weight gets a gradient from every batch."""
    named = dict(model.named_parameters())
    if any(CROSS_ATTENTION.search(name) for name in named):
        return False
    is_text_only = model.config.get_text_config() is model.config
    if is_text_only and not any(".experts." in name for name in named):
        return True
    if model.config.model_type not in EVERY_WEIGHT_USED:
        return False
    if any(re.search(r"\.experts\.\d+\.", name) for name in named):
        return False  # custom code whose experts are modules: one that no token is sent to has no gradient
    used = _text_weights(model)
    return is_text_only or all(id(weight) in used for weight in named.values() if weight.requires_grad)


def _text_weights(model: PreTrainedModel) -> set[int]:
    """Return the identities of the weights of a model's decoder and output embedding."""
    head = model.get_output_embeddings()
    modules = [model.get_decoder(), *([] if head is None else [head])]
    return {id(parameter) for module in modules for parameter in module.parameters()}
