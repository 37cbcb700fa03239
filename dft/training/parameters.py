"""Sizes, shapes and precision of model parameters, whether or not ZeRO-3 shards them."""

import torch
import transformers
import xxhash
from torch import nn
from transformers import PreTrainedModel

GIB = 2**30


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
    used = {id(parameter) for parameter in model.get_decoder().parameters()}
    head = model.get_output_embeddings()
    used.update(id(parameter) for parameter in (head.parameters() if head is not None else ()))
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

    transformers lets DDP search in every model. That costs time in each step, and each rank warns if all
    parameters have a gradient. Only experts that no token was routed to, and image or audio modules, have
    none.
    """
    configured = training.ddp_find_unused_parameters
    is_text_only = model.config.get_text_config() is model.config
    has_experts = any(".experts." in name for name, _ in model.named_parameters())
    if configured is None and is_text_only and not has_experts:
        return False
    return configured
