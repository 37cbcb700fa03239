"""Activations of mixtures of experts, compared with what the layers keep for the backward pass."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from dft.training.memory.estimate import estimate_activations
from dft.training.memory.experts import active_mlp
from dft.training.parameters import GIB

WIDTH, LAYERS, TOKENS = 64, 2, 64
SIZES = {
    "vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def make(config):
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def qwen3_moe(experts_per_token, **sizes):
    return Qwen3MoeConfig(
        **SIZES, intermediate_size=160, moe_intermediate_size=96, num_experts=8,
        num_experts_per_tok=experts_per_token, **sizes,
    )  # fmt: skip


def kept_bytes(model):
    """Return the bytes of tensors that the layers keep for the backward pass, except for weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages, tensors = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.arange(TOKENS).view(2, -1) % 50
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=ids)
    return sum(storages.values())


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, intermediate_size=256),
        qwen3_moe(1),
        qwen3_moe(2),
        qwen3_moe(8),
        qwen3_moe(4, mlp_only_layers=[0]),
        Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=32, shared_expert_intermediate_size=128, num_experts=4,
            num_experts_per_tok=2,
        ),
    ],
    ids=["dense", "1 of 8", "2 of 8", "8 of 8", "one dense layer", "shared expert"],
)  # fmt: skip
def test_estimated_activations_are_close_to_what_the_layers_keep(tmp_path, config):
    model, arguments = make(config), transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    estimate = estimate_activations(model, arguments, 2, TOKENS, checkpointed=False) * GIB
    assert estimate == pytest.approx(kept_bytes(model), rel=0.2)


def test_size_of_the_active_experts_counts_shared_experts_and_dense_layers():
    assert active_mlp(make(Qwen3Config(**SIZES, intermediate_size=256))) == (256, 0)
    assert active_mlp(make(qwen3_moe(3))) == (3 * 96, 3)
    assert active_mlp(make(qwen3_moe(3, mlp_only_layers=[0]))) == ((3 * 96 + 160) / 2, 1.5)
