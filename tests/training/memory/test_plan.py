"""Planned memory: against bytes counted by hand, and peaks that were measured on a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from dft.arguments.lora import LoraArguments
from dft.loss.tiles import TILE_BYTES
from dft.report.terminal.plan import base_model_gib
from dft.training.memory.estimate import MemoryLayout, resolve_layout
from dft.training.memory.plan import (
    HEADROOM,
    PlanSetting,
    closest_fitting_plans,
    equivalent_settings,
    plan,
    requested_setting,
)
from dft.training.model.adapters import add_adapters, pack_linear
from dft.training.parameters import GIB


def shapes(layers, width, inner, vocab, heads, groups, tied=True, dtype=torch.bfloat16):
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=64, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")


def arguments(folder, **flags):
    return transformers.TrainingArguments(str(folder), use_cpu=True, **flags)


def test_the_parts_are_those_counted_by_hand(tmp_path):
    model = shapes(2, 128, 256, 500, 2, 1, dtype=torch.float32)
    attention, mlp = 128 * 128 * 2 + 128 * 64 * 2, 3 * 128 * 256
    count = 500 * 128 + 2 * (attention + mlp + 2 * 128 + 2 * 64) + 128
    assert sum(one.numel() for one in model.parameters()) == count
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    found = plan(model, args, requested_setting(model, args, 1), longest=10, fused=True)
    parts = {name: round(value * GIB) for name, value in found.parts.items()}
    assert parts["weights"] == parts["gradients"] == 4 * count
    assert parts["optimizer"] == 8 * count
    assert parts["loss"] == 4 * 500 * 128 + 4 * 500 * 40
    assert parts["activations"] == 4 * 2 * 40 * (10 * 128 + 5 * 256)
    assert found.peak * GIB == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2, 2, 12 / 8), (2, 2, 2 / 8, 12 / 8), (3, 2 / 8, 2 / 8, 12 / 8)],
)
def test_stages_of_zero_share_what_they_share(tmp_path, stage, weights, gradients, optimizer):
    model, args = shapes(2, 128, 256, 500, 2, 1), arguments(tmp_path)
    count = sum(one.numel() for one in model.parameters())
    setting = PlanSetting(MemoryLayout(8, stage, False, False, 2), 1, 1, False)
    parts = plan(model, args, setting, 10, fused=True).parts
    assert parts["weights"] * GIB == pytest.approx(weights * count)
    assert parts["gradients"] * GIB == pytest.approx(gradients * count)
    assert parts["optimizer"] * GIB == pytest.approx(optimizer * count)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_fsdp_in_half_precision_keeps_float32_and_no_copy(tmp_path, loaded):
    """accelerate raises trained weights to float32 shards and casts a layer at a time."""
    model = shapes(2, 128, 256, 500, 2, 1, dtype=loaded)
    count = sum(one.numel() for one in model.parameters())
    args = arguments(tmp_path, bf16=True)
    args.fsdp = True
    asked = replace(requested_setting(model, args, 1), layout=replace(resolve_layout(model, args), ranks=8))
    parts = plan(model, args, asked, 10, fused=True).parts
    assert "autocast" not in parts
    assert parts["weights"] * GIB == parts["gradients"] * GIB == pytest.approx(4 * count / 8)
    assert parts["optimizer"] * GIB == pytest.approx(8 * count / 8)


def test_autocast_keeps_copies_of_float32_weights_and_zero_does_not(tmp_path):
    model, args = shapes(2, 128, 256, 500, 2, 1, dtype=torch.float32), arguments(tmp_path, bf16=True)
    count = sum(one.numel() for one in model.parameters())
    asked = requested_setting(model, args, 1)
    assert plan(model, args, asked, 10, fused=True).parts["autocast"] * GIB == 2 * count
    sharded = PlanSetting(MemoryLayout(8, 3, False, False, 2), 1, 1, False)
    under_zero = plan(model, args, sharded, 10, fused=True).parts
    assert "autocast" not in under_zero
    assert under_zero["activations"] < plan(model, args, asked, 10, fused=True).parts["activations"]


def test_weights_in_4_bits_take_half_a_byte_and_their_scales(tmp_path):
    model = shapes(2, 128, 256, 500, 2, 1, tied=False)
    head = model.get_output_embeddings()
    linear = [one for one in model.modules() if isinstance(one, nn.Linear) and one is not head]
    packed = sum(one.weight.numel() for one in linear)
    rest = sum(one.numel() for one in model.parameters()) - packed
    pack_linear(model)
    with torch.device("meta"):
        adapted = add_adapters(model, LoraArguments(lora_r=4, load_in_4bit=True), arguments(tmp_path), "m")
    adapters = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    args = arguments(tmp_path, bf16=True)
    asked = replace(
        requested_setting(adapted, args, 1), layout=replace(resolve_layout(adapted, args), ranks=8)
    )
    found = plan(adapted, args, asked, 10, fused=True)
    # What is not packed is raised to float32, as peft prepares it.
    assert found.parts["weights"] * GIB == pytest.approx(packed / 2 * (1 + 1 / 32) + 4 * (rest + adapters))
    assert not any("deepspeed" in one for near in proposed(adapted, args, asked) for one in near)


def proposed(model, args, asked):
    return [one.setting.changes for one in closest_fitting_plans(model, args, asked, 10, True, memory=1e6)]


@pytest.mark.parametrize("fsdp", [False, True])
def test_zero3_is_proposed_where_it_can_be_had(tmp_path, fsdp):
    model, args = shapes(12, 1024, 4096, 32_000, 16, 8, dtype=torch.float32), arguments(tmp_path)
    args.fsdp = fsdp
    asked = replace(requested_setting(model, args, 1), layout=replace(resolve_layout(model, args), ranks=8))
    changes = [one.changes for one in equivalent_settings(asked, args, True, shardable=not fsdp)]
    assert any("zero3" in word for change in changes for word in change) != fsdp


@pytest.mark.parametrize(
    ("model", "rows", "checkpointed", "measured"),
    [
        ((24, 896, 4864, 151_936, 14, 2), 16, False, 54.85),
        ((24, 896, 4864, 151_936, 14, 2), 16, True, 9.57),
        ((16, 2048, 8192, 32_000, 32, 8), 8, True, 10.00),
    ],
)
def test_peaks_measured_on_a_gpu(tmp_path, model, rows, checkpointed, measured):
    """One H200; docs/benchmarks.md has the runs, and docs/planning.md how far each is off."""
    made, args = shapes(*model), arguments(tmp_path)
    setting = PlanSetting(MemoryLayout(1, 0, False, False, 2, "cuda"), rows, 1, checkpointed)
    assert plan(made, args, setting, 2048, fused=True).peak == pytest.approx(measured, rel=0.22)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_frozen_base_model_has_logits_on_any_device(tmp_path, device):
    model = shapes(2, 128, 256, 500, 2, 1)
    training = SimpleNamespace(
        device=torch.device(device), per_device_train_batch_size=4, mixed_precision="no"
    )
    weights = 2 * sum(one.numel() for one in model.parameters())
    whole = 4 * 10 * 500 * (2 + 4)
    assert base_model_gib(model, training, 10, fused=False) * GIB == weights + whole
    assert (
        base_model_gib(model, training, 10**6, fused=True) * GIB
        == weights + TILE_BYTES[device.replace("mps", "cpu")]
    )


def test_a_frozen_base_model_is_counted(tmp_path):
    model, args = shapes(2, 128, 256, 500, 2, 1), arguments(tmp_path)
    alone, both = (
        plan(model, args, requested_setting(model, args, 1, beside), 10, fused=True) for beside in (0.0, 0.5)
    )
    assert both.peak == alone.peak + 0.5 and both.parts == {**alone.parts, "base model": 0.5}
    asked = requested_setting(model, args, 1, extra_gib=0.5)
    assert not closest_fitting_plans(model, args, asked, 10, True, memory=0.5)


def test_what_is_proposed_fits_and_nothing_nearer_does(tmp_path):
    model = shapes(12, 1024, 4096, 32_000, 16, 8, dtype=torch.float32)
    args = arguments(tmp_path, per_device_train_batch_size=16)
    asked = requested_setting(model, args, 1)
    wanted = plan(model, args, asked, 2048, fused=True).peak
    state = sum(plan(model, args, asked, 1, fused=True).parts[one] for one in ("weights", "optimizer"))
    for memory in (wanted / 2, wanted / 4, state / 2):
        found = closest_fitting_plans(model, args, asked, 2048, True, memory)
        assert bool(found) == (memory > state)
        for one in found:
            assert one.peak <= HEADROOM * memory and len(one.setting.changes) == len(found[0].setting.changes)
            assert one.setting.rows * one.setting.accumulation == 16
            double = PlanSetting(asked.layout, one.setting.rows * 2, 1, one.setting.checkpointed)
            if one.setting.rows < 16:
                assert plan(model, args, double, 2048, fused=True).peak > HEADROOM * memory
