"""Command-line flags for loading the model."""

from dataclasses import dataclass, field
from typing import ClassVar

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Which model, and how it is held in memory."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the model and its tokenizer."})
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights: float32, bfloat16, float16, or auto (as in the checkpoint). "
            "Default: under DeepSpeed the dtype it computes in (it keeps float32 master weights), else "
            "float32.",
            "choices": [*DTYPES, "auto"],
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "auto (flash_attention_2 where it can be imported on CUDA, else sdpa), "
            "flash_attention_2, sdpa, eager, or any name transformers knows."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model or its tokenizer."}
    )
    enable_gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass: slower, far less memory."},
    )
