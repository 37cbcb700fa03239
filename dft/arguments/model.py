"""Command-line flags for loading the model."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelArguments:
    """Model flags."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of the model and its tokenizer."},
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights: float32, bfloat16, float16, or auto (as saved). Default: "
            "float32, or with --deepspeed the compute dtype, because DeepSpeed keeps float32 master "
            "weights.",
            "choices": [*DTYPES, "auto"],
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "Attention implementation: varlen, which computes no padding on any device; an "
            "implementation of transformers: flash_attention_2, sdpa, eager, ...; or auto, which uses "
            "flash_attention_2 on CUDA if it is installed, else varlen if the model fits, else sdpa."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that is part of the model or tokenizer repository."},
    )
    add_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Special tokens to add to the vocabulary, such as '<|im_start|>' '<|im_end|>'. Their "
            "embeddings begin as the mean of all others. With --lora_r, the input and output embedding are "
            "trained as a whole in addition to the adapters."
        },
    )
    dequantize: bool = field(
        default=False,
        metadata={
            "help": "Convert weights that are saved in 4 bits (MXFP4, as those of gpt-oss) to --torch_dtype "
            "when they are loaded, because they cannot be trained in 4 bits. They are saved converted."
        },
    )
    enable_gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Recompute activations in the backward pass, which is slower and needs far less memory."
        },
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Freeze the weights whose whole names match one of these shell patterns, such as "
            "'model.layers.[0-7].*' 'model.embed_tokens.*'. Default: all weights are trained."
        },
    )
