"""Planned memory, compared with bytes counted by hand and with peaks measured on a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch import nn
from torch.utils.data import BatchSampler
from transformers import Qwen3Config, Qwen3ForCausalLM

from dft import DFTTrainer
from dft.arguments.lora import LoraArguments
from dft.arguments.training import TrainingArguments
from dft.loss.tiles import HALF_TILE_SHARE, TILE_BYTES
from dft.report.terminal.plan import base_model_gib
from dft.training.memory.batch_tokens import full_rows, largest_micro_batch
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
from dft.training.samplers import training_sampler
from tests.training.test_batching import build_model


def meta_model(layers, width, inner, vocab, heads, groups, tied=True, dtype=torch.bfloat16):
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=64, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")


def arguments(folder, **flags):
    return transformers.TrainingArguments(str(folder), use_cpu=True, **flags)


def test_parts_equal_those_counted_by_hand(tmp_path):
    model = meta_model(2, 128, 256, 500, 2, 1, dtype=torch.float32)
    attention, mlp = 128 * 128 * 2 + 128 * 64 * 2, 3 * 128 * 256
    count = 500 * 128 + 2 * (attention + mlp + 2 * 128 + 2 * 64) + 128
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    planned = plan(model, args, requested_setting(model, args, 1), full_rows(10), fused=True)
    parts = {name: round(value * GIB) for name, value in planned.parts.items()}
    assert parts["weights"] == parts["gradients"] == 4 * count
    assert parts["optimizer"] == 8 * count
    assert parts["loss"] == 4 * 500 * 128 + 4 * 500 * 40
    assert parts["activations"] == 4 * 2 * 40 * (10 * 128 + 5 * 256)
    assert planned.peak * GIB == pytest.approx(sum(parts.values()))


def test_muon_has_one_momentum_for_each_matrix_of_the_hidden_layers(tmp_path):
    model = meta_model(2, 128, 256, 500, 2, 1, dtype=torch.float32)
    matrices = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    others = 500 * 128 + 2 * (2 * 128 + 2 * 64) + 128
    args = TrainingArguments(str(tmp_path), use_cpu=True, optim="muon")
    assert parts_of(model, args)["optimizer"] * GIB == 4 * (matrices + 2 * others)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert parts_of(model, args)["optimizer"] * GIB == 4 * (matrices - 128 * 256 + 2 * others)


def parts_of(model, args) -> dict[str, float]:
    return plan(model, args, requested_setting(model, args, 1), full_rows(10), fused=True).parts


@pytest.mark.parametrize("optim", ["muon", "adafactor"])
def test_zero_is_not_proposed_for_an_optimizer_of_whole_matrices(tmp_path, optim):
    model = meta_model(2, 128, 256, 500, 2, 1, dtype=torch.float32)
    args = TrainingArguments(str(tmp_path), use_cpu=True, optim=optim)
    requested = replace(
        requested_setting(model, args, 1), layout=replace(resolve_layout(model, args), ranks=8)
    )
    needed = plan(model, args, requested, full_rows(10), fused=True).peak
    proposed = {}
    for name in ("adamw_torch", optim):
        args = TrainingArguments(str(tmp_path), use_cpu=True, optim=name)
        plans = closest_fitting_plans(model, args, requested, full_rows(10), True, needed / 2)
        proposed[name] = [flag for fitting in plans for flag in fitting.setting.changes]
    assert "--deepspeed zero3" in proposed["adamw_torch"]
    assert "--deepspeed zero3" not in proposed[optim]


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2, 2, 12 / 8), (2, 2, 2 / 8, 12 / 8), (3, 2 / 8, 2 / 8, 12 / 8)],
)
def test_zero_stages_divide_what_they_shard(tmp_path, stage, weights, gradients, optimizer):
    model, args = meta_model(2, 128, 256, 500, 2, 1), arguments(tmp_path)
    count = sum(parameter.numel() for parameter in model.parameters())
    setting = PlanSetting(MemoryLayout(8, stage, False, False, 2), 1, 1, False)
    parts = plan(model, args, setting, full_rows(10), fused=True).parts
    assert parts["weights"] * GIB == pytest.approx(weights * count)
    assert parts["gradients"] * GIB == pytest.approx(gradients * count)
    assert parts["optimizer"] * GIB == pytest.approx(optimizer * count)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_fsdp_in_half_precision_keeps_float32_weights_and_no_copy(tmp_path, loaded):
    """accelerate keeps trained weights as float32 shards and casts one layer at a time."""
    model = meta_model(2, 128, 256, 500, 2, 1, dtype=loaded)
    count = sum(parameter.numel() for parameter in model.parameters())
    args = arguments(tmp_path, bf16=True)
    args.fsdp = True
    requested = replace(
        requested_setting(model, args, 1), layout=replace(resolve_layout(model, args), ranks=8)
    )
    parts = plan(model, args, requested, full_rows(10), fused=True).parts
    assert "autocast" not in parts
    assert parts["weights"] * GIB == parts["gradients"] * GIB == pytest.approx(4 * count / 8)
    assert parts["optimizer"] * GIB == pytest.approx(8 * count / 8)


def test_autocast_keeps_copies_of_float32_weights_and_zero_does_not(tmp_path):
    model, args = meta_model(2, 128, 256, 500, 2, 1, dtype=torch.float32), arguments(tmp_path, bf16=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    requested = requested_setting(model, args, 1)
    assert plan(model, args, requested, full_rows(10), fused=True).parts["autocast"] * GIB == 2 * count
    sharded = PlanSetting(MemoryLayout(8, 3, False, False, 2), 1, 1, False)
    under_zero = plan(model, args, sharded, full_rows(10), fused=True).parts
    assert "autocast" not in under_zero
    assert (
        under_zero["activations"]
        < plan(model, args, requested, full_rows(10), fused=True).parts["activations"]
    )


def test_adapters_are_float32_whatever_the_dtype_of_the_model(tmp_path):
    """peft creates them in float32; under ZeRO they have the dtype of the model, and float32 copies."""
    model = meta_model(2, 128, 256, 500, 2, 1)
    frozen = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):
        adapted = add_adapters(model, LoraArguments(lora_r=4), arguments(tmp_path), "m")
    adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    args = arguments(tmp_path, bf16=True)
    parts = plan(adapted, args, requested_setting(adapted, args, 1), full_rows(10), fused=True).parts
    assert parts["weights"] * GIB == 2 * frozen + 4 * adapters
    assert parts["gradients"] * GIB == 4 * adapters and parts["optimizer"] * GIB == 8 * adapters
    sharded = PlanSetting(MemoryLayout(8, 3, False, False, 2), 1, 1, False)
    parts = plan(adapted, args, sharded, full_rows(10), fused=True).parts
    assert parts["weights"] * GIB == pytest.approx(2 * (frozen + adapters) / 8)
    assert parts["optimizer"] * GIB == pytest.approx(12 * adapters / 8)


def test_4_bit_weights_take_half_a_byte_and_their_scales(tmp_path):
    model = meta_model(2, 128, 256, 500, 2, 1, tied=False)
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    packed = sum(layer.weight.numel() for layer in linear)
    unpacked = sum(parameter.numel() for parameter in model.parameters()) - packed
    pack_linear(model)
    with torch.device("meta"):
        adapted = add_adapters(model, LoraArguments(lora_r=4, load_in_4bit=True), arguments(tmp_path), "m")
    adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    args = arguments(tmp_path, bf16=True)
    requested = replace(
        requested_setting(adapted, args, 1), layout=replace(resolve_layout(adapted, args), ranks=8)
    )
    planned = plan(adapted, args, requested, full_rows(10), fused=True)
    # peft converts all other weights to float32.
    assert planned.parts["weights"] * GIB == pytest.approx(
        packed / 2 * (1 + 1 / 32) + 4 * (unpacked + adapters)
    )
    assert not any(
        "deepspeed" in flag for flags in proposed_flags(adapted, args, requested) for flag in flags
    )


def proposed_flags(model, args, requested):
    plans = closest_fitting_plans(model, args, requested, full_rows(10), True, memory=1e6)
    return [fitting.setting.changes for fitting in plans]


@pytest.mark.parametrize("fsdp", [False, True])
def test_zero3_is_proposed_only_where_it_is_possible(tmp_path, fsdp):
    model, args = meta_model(12, 1024, 4096, 32_000, 16, 8, dtype=torch.float32), arguments(tmp_path)
    args.fsdp = fsdp
    requested = replace(
        requested_setting(model, args, 1), layout=replace(resolve_layout(model, args), ranks=8)
    )
    settings = equivalent_settings(requested, args, True, shardable=not fsdp)
    assert any("zero3" in flag for setting in settings for flag in setting.changes) != fsdp


@pytest.mark.parametrize(
    ("sizes", "rows", "checkpointed", "measured"),
    [
        ((24, 896, 4864, 151_936, 14, 2), 16, False, 54.85),
        ((24, 896, 4864, 151_936, 14, 2), 16, True, 9.57),
        ((16, 2048, 8192, 32_000, 32, 8), 8, True, 10.00),
    ],
)
def test_plan_is_close_to_peaks_measured_on_a_gpu(tmp_path, sizes, rows, checkpointed, measured):
    """Measured on an H200; docs/benchmarks.md has the runs, and docs/planning.md the errors."""
    model, args = meta_model(*sizes), arguments(tmp_path)
    setting = PlanSetting(MemoryLayout(1, 0, False, False, 2, "cuda"), rows, 1, checkpointed)
    assert plan(model, args, setting, full_rows(2048), fused=True).peak == pytest.approx(measured, rel=0.22)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_base_model_size_includes_logits_on_any_device(tmp_path, device):
    model = meta_model(2, 128, 256, 500, 2, 1)
    training = SimpleNamespace(per_device_train_batch_size=4, mixed_precision="no")
    layout = MemoryLayout(1, 0, False, False, 2, device)
    tile = TILE_BYTES["cuda"] if device != "cpu" else TILE_BYTES["cpu"] // HALF_TILE_SHARE
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    logits = 4 * 10 * 500 * (2 + 4)
    assert base_model_gib(model, training, layout, 40, fused=False) * GIB == weights + logits
    assert base_model_gib(model, training, layout, 10**6, fused=True) * GIB == weights + tile


DATA = Dataset.from_list(
    [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 50, 7, 20, 4, 31, 9, 2, 5)]
)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize(
    "flags",
    [
        {"num_train_epochs": 3}, {"max_steps": 5}, {"max_steps": 2, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2, "dataloader_drop_last": True}, {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_planned_micro_batch_is_the_largest_of_the_run(tmp_path, attention, flags):
    """The plan computes it from the order of the data; here the trainer makes the batches."""
    args = arguments(
        tmp_path, per_device_train_batch_size=2, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_strategy="no", **flags,
    )  # fmt: skip
    model = build_model("qwen3", attention)
    planned = largest_micro_batch(model, args, DATA, ranks=1)(2)
    trainer, sizes = DFTTrainer(model, args, train_dataset=DATA), []
    collator = trainer.data_collator

    def recording(examples):
        batch = collator(examples)
        sizes.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = recording
    trainer.train()
    assert planned == max(sizes[: trainer.state.global_step * args.gradient_accumulation_steps])


def test_the_planned_micro_batch_of_fewer_rows_or_more_ranks_is_of_the_same_order(tmp_path):
    model = build_model("qwen3", "varlen")
    args = arguments(tmp_path, per_device_train_batch_size=4, train_sampling_strategy="sequential")
    largest = largest_micro_batch(model, args, DATA, ranks=1)
    assert [largest(rows) for rows in (1, 2, 4)] == [50, 53, 80]
    assert largest_micro_batch(model, args, DATA, ranks=2)(4) == 80
    padded = largest_micro_batch(build_model("qwen3", "sdpa"), args, DATA, ranks=1)
    assert [padded(rows) for rows in (1, 2, 4)] == [50, 100, 200]


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_planned_micro_batch_is_the_largest_of_all_ranks(tmp_path, ranks, strategy):
    """accelerate assigns the batches of the sampler to the ranks in turn."""
    flags = {"per_device_train_batch_size": 2, "max_steps": 1, "train_sampling_strategy": strategy}
    args = arguments(tmp_path, **flags)
    sampler, sizes = training_sampler(args, DATA, 2 * ranks, 2 * ranks), []
    for rank in range(ranks):
        shard = BatchSamplerShard(BatchSampler(sampler, 2, False), ranks, rank)
        sizes.append(sum(len(DATA[index]["input_ids"]) for index in next(iter(shard))))
    assert largest_micro_batch(build_model("qwen3", "varlen"), args, DATA, ranks)(2) == max(sizes)


def test_base_model_is_counted(tmp_path):
    model, args = meta_model(2, 128, 256, 500, 2, 1), arguments(tmp_path)
    alone, both = (
        plan(model, args, requested_setting(model, args, 1, extra), full_rows(10), fused=True)
        for extra in (0.0, 0.5)
    )
    assert both.peak == alone.peak + 0.5 and both.parts == {**alone.parts, "base model": 0.5}
    requested = requested_setting(model, args, 1, extra_gib=0.5)
    assert not closest_fitting_plans(model, args, requested, full_rows(10), True, memory=0.5)


def test_proposed_settings_fit_and_larger_batches_do_not(tmp_path):
    model = meta_model(12, 1024, 4096, 32_000, 16, 8, dtype=torch.float32)
    args = arguments(tmp_path, per_device_train_batch_size=16)
    requested = requested_setting(model, args, 1)
    peak = plan(model, args, requested, full_rows(2048), fused=True).peak
    parts = plan(model, args, requested, full_rows(1), fused=True).parts
    state = parts["weights"] + parts["optimizer"]
    for memory in (peak / 2, peak / 4, state / 2):
        plans = closest_fitting_plans(model, args, requested, full_rows(2048), True, memory)
        assert bool(plans) == (memory > state)
        for fitting in plans:
            setting = fitting.setting
            assert fitting.peak <= HEADROOM * memory
            assert len(setting.changes) == len(plans[0].setting.changes)
            assert setting.rows * setting.accumulation == 16
            double = PlanSetting(requested.layout, setting.rows * 2, 1, setting.checkpointed)
            if setting.rows < 16:
                assert plan(model, args, double, full_rows(2048), fused=True).peak > HEADROOM * memory
