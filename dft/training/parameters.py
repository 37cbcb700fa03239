"""Sizes, shapes and precision of model parameters, sharded by ZeRO-3 or not."""

import torch
import transformers
import xxhash
from torch import nn

GIB = 2**30


def element_count(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO-3 keeps a part of it here."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def element_dims(parameter: nn.Parameter) -> int:
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.dim()


def shapes_digest(model: nn.Module) -> str:
    """Of the names and shapes of a model's weights."""
    lines = sorted(
        f"{name} {list(one.ds_shape if hasattr(one, 'ds_shape') else one.shape)}\n"
        for name, one in model.named_parameters()
    )
    return xxhash.xxh3_64_hexdigest("".join(lines).encode())


def compute_dtype(args: transformers.TrainingArguments, model: nn.Module) -> torch.dtype:
    """In which precision the model's matrix products are computed. TF32 rounds about as float16 does."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16 or (args.tf32 and model.dtype == torch.float32):
        return torch.float16
    return model.dtype
