"""Tiny models of architectures that differ in how their weights are named, fused and wrapped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = torch.cat([FP4, -FP4])
"""Values of the 16 codes of a number in 4 bits (OCP Microscaling Formats, E2M1)."""
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def sizes(vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, **more,
    }  # fmt: skip


def llama(vocab: int) -> PreTrainedModel:
    config = transformers.LlamaConfig(**sizes(vocab, tie_word_embeddings=False))
    return transformers.LlamaForCausalLM(config)


def gpt2(vocab: int) -> PreTrainedModel:
    config = transformers.GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    return transformers.GPT2LMHeadModel(config)


def qwen3_moe(vocab: int) -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(**sizes(vocab), **EXPERTS, num_experts=4)
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3(vocab: int) -> PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **{**sizes(vocab, num_key_value_heads=4), "head_dim": None}, **EXPERTS, n_routed_experts=4, n_group=1,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss(vocab: int) -> PreTrainedModel:
    """A model with sizes that MXFP4 needs: 32 input features have one scale."""
    config = transformers.GptOssConfig(
        **{**sizes(vocab), "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=16,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config).bfloat16()


def gemma3(vocab: int) -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=sizes(vocab, sliding_window=64, query_pre_attn_scalar=8, model_type="gemma3_text"),
        vision_config={**VISION, "image_size": 32, "patch_size": 8}, mm_tokens_per_image=4,
        image_token_index=vocab - 1, boi_token_index=vocab - 2, eoi_token_index=vocab - 3,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5(vocab: int) -> PreTrainedModel:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    config = transformers.Qwen3_5Config(
        text_config=sizes(vocab, **linear, layer_types=["linear_attention", "full_attention"]),
        vision_config={**TOWER, "patch_size": 8}, image_token_id=vocab - 1, video_token_id=vocab - 2,
        vision_start_token_id=vocab - 3, vision_end_token_id=vocab - 4,
    )  # fmt: skip
    return transformers.Qwen3_5ForConditionalGeneration(config)


def qwen2_5_vl(vocab: int) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=sizes(vocab, rope_parameters=rope),
        vision_config={**TOWER, "patch_size": 8, "fullatt_block_indexes": [0]}, image_token_id=vocab - 1,
        video_token_id=vocab - 2, vision_start_token_id=vocab - 3, vision_end_token_id=vocab - 4,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def mistral3(vocab: int) -> PreTrainedModel:
    config = transformers.Mistral3Config(
        text_config=sizes(vocab, model_type="mistral"),
        vision_config={**VISION, "model_type": "pixtral", "image_size": 32, "patch_size": 8},
        image_token_index=vocab - 1,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    make.__name__: make
    for make in (llama, gpt2, gpt_oss, qwen3_moe, deepseek_v3, gemma3, qwen3_5, qwen2_5_vl, mistral3)
}


def make_family(family: str, tokenizer_folder: Path, folder: Path) -> Path:
    """Save a model with the tokenizer of another model. Return its folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    FAMILIES[family](len(tokenizer) + 8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "gpt2":  # as published
        file = folder / "model.safetensors"
        weights = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def quantize_experts(folder: Path) -> dict[str, torch.Tensor]:
    """Replace the experts of a saved gpt_oss model by random weights in MXFP4, as they are published.

    Returns:
        The new weights in float32 by the names that they have in memory.
    """
    generator = torch.Generator().manual_seed(0)
    file = folder / "model.safetensors"
    weights, expected = load_file(file), {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 122, shape, dtype=torch.uint8, generator=generator)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        # Two values in a byte, the lower bits first; the exponent of the scale has a bias of 127.
        values = FP4[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(-2)
        values = values * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def weight_names(folder: Path) -> set[str]:
    """Return the names of all weights in a folder."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names
