"""Sizes of published models, from which their memory can be planned without their weights.

The numbers are those of the `config.json` files that are published with the models.
"""

from typing import Any

import transformers
from transformers import PretrainedConfig

QWEN2 = {"vocab_size": 151_936, "max_position_embeddings": 4096, "tie_word_embeddings": False}
QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960}
LLAMA = {"vocab_size": 128_256, "max_position_embeddings": 131_072}
MISTRAL = {"max_position_embeddings": 32_768, "head_dim": 128, "sliding_window": None}
GEMMA3 = {"head_dim": 256, "max_position_embeddings": 131_072}
GEMMA3_VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip

SIZES: dict[str, tuple[str, tuple[int, int, int, int, int], dict[str, Any]]] = {
    "Qwen/Qwen2.5-Math-1.5B": ("qwen2", (28, 1536, 8960, 12, 2), {**QWEN2, "tie_word_embeddings": True}),
    "Qwen/Qwen2.5-Math-7B": ("qwen2", (28, 3584, 18_944, 28, 4), {**QWEN2, "vocab_size": 152_064}),
    "Qwen/Qwen3-0.6B": ("qwen3", (28, 1024, 3072, 16, 8), {**QWEN3, "tie_word_embeddings": True}),
    "Qwen/Qwen3-1.7B": ("qwen3", (28, 2048, 6144, 16, 8), {**QWEN3, "tie_word_embeddings": True}),
    "Qwen/Qwen3-4B": ("qwen3", (36, 2560, 9728, 32, 8), {**QWEN3, "tie_word_embeddings": True}),
    "Qwen/Qwen3-8B": ("qwen3", (36, 4096, 12_288, 32, 8), QWEN3),
    "Qwen/Qwen3-14B": ("qwen3", (40, 5120, 17_408, 40, 8), QWEN3),
    "Qwen/Qwen3-32B": ("qwen3", (64, 5120, 25_600, 64, 8), QWEN3),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama", (16, 2048, 8192, 32, 8), {**LLAMA, "tie_word_embeddings": True}
    ),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", (32, 4096, 14_336, 32, 8), LLAMA),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", (80, 8192, 28_672, 64, 8), LLAMA),
    "google/gemma-3-1b-it": (
        "gemma3_text", (26, 1152, 6912, 4, 1), {**GEMMA3, "vocab_size": 262_144, "sliding_window": 512}
    ),
    "google/gemma-3-4b-it": ("gemma3", (34, 2560, 10_240, 8, 4), {**GEMMA3, "vocab_size": 262_208}),
    "google/gemma-3-12b-it": ("gemma3", (48, 3840, 15_360, 16, 8), {**GEMMA3, "vocab_size": 262_208}),
    "google/gemma-3-27b-it": (
        "gemma3", (62, 5376, 21_504, 32, 16), {**GEMMA3, "vocab_size": 262_208, "head_dim": 128}
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        "mistral", (32, 4096, 14_336, 32, 8), {**MISTRAL, "vocab_size": 32_768}
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        "mistral", (40, 5120, 32_768, 32, 8), {**MISTRAL, "vocab_size": 131_072}
    ),
    "microsoft/phi-4": (
        "phi3", (40, 5120, 17_920, 40, 10), {"vocab_size": 100_352, "max_position_embeddings": 16_384}
    ),
    "openai/gpt-oss-20b": (
        "gpt_oss", (24, 2880, 2880, 64, 8),
        {
            "vocab_size": 201_088, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
            "max_position_embeddings": 131_072, "quantization_config": {"quant_method": "mxfp4"},
        },
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        "smollm3", (36, 2048, 11_008, 16, 4), {"vocab_size": 128_256, "max_position_embeddings": 65_536}
    ),
}  # fmt: skip
"""Model type, sizes and other settings of each model, by its name on the hub.

The sizes are the number of layers, the width, the width of the MLP, the number of attention heads, and that
of heads of keys and values.
"""


def published_config(name: str) -> PretrainedConfig:
    """Return the configuration of a published model, as far as memory depends on it."""
    kind, (layers, width, mlp_width, heads, groups), settings = SIZES[name]
    settings = {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp_width,
        "num_attention_heads": heads, "num_key_value_heads": groups, **settings,
    }  # fmt: skip
    if kind == "phi3":
        settings["pad_token_id"] = None  # that of the class lies outside of this vocabulary
    if kind == "gemma3":
        settings = {"text_config": settings, "vision_config": GEMMA3_VISION}
    return transformers.AutoConfig.for_model(kind, **settings)
