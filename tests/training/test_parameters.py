"""Models in which DDP does not have to look for weights without a gradient."""

import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dft.arguments.lora import LoraArguments
from dft.training.model.adapters import add_adapters
from dft.training.parameters import EVERY_WEIGHT_USED, freeze_unused_parts, resolve_find_unused_parameters
from tests.families import FAMILIES

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "moe_intermediate_size": 16, "num_experts": 8, "num_local_experts": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "moe_num_experts": 8, "moe_k": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "shared_expert_intermediate_size": 16,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 2,
}  # fmt: skip


def make(model_type):
    """Return a small model; an architecture takes the sizes whose names it has."""
    torch.manual_seed(0)
    if model_type in FAMILIES:
        model = FAMILIES[model_type](VOCABULARY).float()
    else:
        config = type(AutoConfig.for_model(model_type))
        names = inspect.signature(config.__init__).parameters
        sizes = {name: size for name, size in SIZES.items() if name in names}
        model = AutoModelForCausalLM.from_config(config(**sizes))
    freeze_unused_parts(model)
    return model


def resolve(model, tmp_path, **flags):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, **flags)
    return resolve_find_unused_parameters(model, arguments)


@pytest.mark.parametrize("model_type", sorted({*EVERY_WEIGHT_USED, "llama", "gpt2"}))
def test_every_trained_weight_has_a_gradient_where_ddp_does_not_search(tmp_path, model_type):
    model = make(model_type)
    # Two tokens cannot reach all eight experts.
    logits = model(input_ids=torch.tensor([[5, 6]]), use_cache=False).logits
    logits.log_softmax(-1)[0, 0, 6].backward()
    named = model.named_parameters()
    assert not [name for name, weight in named if weight.requires_grad and weight.grad is None]
    assert resolve(model, tmp_path) is False
    assert resolve(model, tmp_path, ddp_find_unused_parameters=True) is True


def test_ddp_searches_where_a_weight_may_have_no_gradient(tmp_path):
    assert resolve(make("deepseek_v32"), tmp_path) is None  # its indexer has none
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 4}
    decoder = AutoModelForCausalLM.from_config(transformers.BartConfig(vocab_size=VOCABULARY, **sizes))
    decoder(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    unused = [name for name, weight in decoder.named_parameters() if weight.grad is None]
    assert unused and all("encoder_attn" in name for name in unused)
    assert resolve(decoder, tmp_path) is None

    adapted = add_adapters(make("gemma3"), LoraArguments(lora_r=2), transformers.TrainingArguments(), "m")
    assert any("vision_tower" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    assert resolve(adapted, tmp_path) is None
    text = LoraArguments(lora_r=2, lora_target_modules=["up_proj"])
    assert (
        resolve(add_adapters(make("gemma3"), text, transformers.TrainingArguments(), "m"), tmp_path) is False
    )

    custom = make("qwen3_moe")  # code of a model on the hub, in which each expert is a module
    custom.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(4, 4)])
    assert resolve(custom, tmp_path) is None
