"""Resolve the dtype and the attention implementation that a model is loaded with."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from dft.arguments.model import DTYPES
from dft.arguments.parser import Arguments
from dft.errors import UserError
from dft.training.attention.choice import attention_of, varlen_obstacle
from dft.training.attention.interface import VARLEN
from dft.training.batching import packing_obstacle

FLASH = "flash_attention_2"


def resolve_dtype(arguments: Arguments) -> torch.dtype | str:
    """Return the dtype to load weights in; "auto" is the dtype of the checkpoint."""
    dtype = arguments.model.torch_dtype
    if dtype == "auto":
        return dtype
    if dtype is None:
        precision = arguments.training.mixed_precision if arguments.training.deepspeed else "no"
        dtype = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[precision]
    return DTYPES[dtype]


def resolve_attention(arguments: Arguments) -> str:
    """Return the attention implementation to load the model with.

    "auto" leaves the choice to transformers, which selects sdpa if the model supports it, and then to
    `use_varlen_attention`.

    Raises:
        UserError: there is no implementation of that name, or this machine does not support it.
    """
    attention = arguments.model.attn_implementation
    training = arguments.training
    # The dtype of a checkpoint ("auto") is nearly always half precision.
    is_half = resolve_dtype(arguments) != torch.float32 or training.mixed_precision != "no"
    if attention == "auto":
        return FLASH if not training.use_cpu and is_flash_attn_2_available() and is_half else "auto"
    names = {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}
    if attention not in names and "/" not in attention:  # a name with a slash is a kernel on the hub
        raise UserError(
            f"--attn_implementation {attention}: no such attention; choose auto, {', '.join(sorted(names))}"
        )
    if attention == "flex_attention" and training.use_cpu:
        raise UserError(
            "--attn_implementation flex_attention: has no backward pass on the CPU; use "
            "--attn_implementation auto"
        )
    if attention == FLASH:
        _check_flash_attention(training.use_cpu, is_half)
    return attention


def use_varlen_attention(model: PreTrainedModel, arguments: Arguments) -> None:
    """Let a model compute attention without padding, if the flags leave the choice and the model fits.

    Otherwise add a note to `arguments.notes` that says why its batches are padded.

    Raises:
        UserError: the flags request `varlen` attention and the model does not fit.
    """
    attention = resolve_attention(arguments)
    if attention not in ("auto", VARLEN):
        return
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = mixed.get(arguments.training.mixed_precision, model.dtype)
    obstacle = varlen_obstacle(model, dtype, arguments.training.device)
    if obstacle is None:
        with attention_of(model, VARLEN):
            obstacle = packing_obstacle(model)
    if obstacle is None:
        model.set_attn_implementation(VARLEN)
    elif attention == VARLEN:
        raise UserError(
            f"--attn_implementation {VARLEN}: {type(model).__name__}: {obstacle}; use "
            "--attn_implementation auto"
        )
    else:
        used = model.config.get_text_config()._attn_implementation
        note = f"batches are padded, with {used} attention: {obstacle}"
        if note not in arguments.notes:  # the base model has the same obstacle as the model
            arguments.notes.append(note)


def _check_flash_attention(use_cpu: bool, is_half: bool) -> None:
    """Raise `UserError` if flash attention is not supported."""
    if use_cpu:
        raise UserError(
            f"--attn_implementation {FLASH}: needs a CUDA GPU, and this run is on CPU; use "
            "--attn_implementation auto"
        )
    if not is_flash_attn_2_available():
        raise UserError(
            f"--attn_implementation {FLASH}: flash-attn is not installed or does not fit this GPU; install "
            "it with `bash scripts/setup.sh` (`--build-flash-attn` builds it from source), or use "
            "--attn_implementation auto"
        )
    if not is_half:
        raise UserError(
            f"--attn_implementation {FLASH}: computes in bfloat16 or float16 only; add --bf16 True, or use "
            "--attn_implementation sdpa"
        )
