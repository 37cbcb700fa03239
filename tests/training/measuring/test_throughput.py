"""Operations compared with torch's own count, the clock, peaks of devices, and memory estimates."""

import time

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dft.loss.tiles import TILE_BYTES
from dft.training.measuring.throughput import Clock, model_flops, peak_flops, peak_memory
from dft.training.memory.estimate import MemoryEstimate, estimate_memory
from dft.training.parameters import GIB
from tests.arguments.test_parser import checked
from tests.training.test_trainer import VOCAB, tiny

BATCH, SEQ = 3, 16


def dense(tied: bool = False) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_operations_equal_the_count_of_torch(tied):
    """torch counts all pairs of attention, without the causal mask, and the head at every position."""
    model = dense(tied)
    ids = torch.randint(64, (BATCH, SEQ))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    tokens, pairs = BATCH * SEQ, BATCH * SEQ * SEQ
    # The count differs a little: torch skips the gradient of the first layer's input.
    assert model_flops(model).total(tokens, pairs, tokens) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_frozen_weights_cost_no_gradient_of_their_own():
    trained = model_flops(dense())
    adapted = dense()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    frozen = model_flops(adapted)
    adapter = sum(weight.numel() for name, weight in adapted.named_parameters() if "lora" in name)
    assert frozen.per_token == pytest.approx(trained.per_token * 4 / 6 + 6 * adapter)
    assert frozen.per_supervised == pytest.approx(trained.per_supervised * 4 / 6)
    assert frozen.per_pair == trained.per_pair


def test_only_active_experts_count():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    one_expert = model_flops(MixtralForCausalLM(config)).per_token
    config.num_experts_per_tok = 3
    assert model_flops(MixtralForCausalLM(config)).per_token - one_expert == 2 * 6 * 3 * 32 * 48
    model = MixtralForCausalLM(config)
    model.config.num_experts_per_tok = 0
    assert model_flops(model) is None


def test_peak_flops_uses_the_longest_matching_name(monkeypatch):
    for name, expected in {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
        "NVIDIA L40S": 362e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "Tesla K80": None,
        "NVIDIA RTX A4000": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 4090": 165e12,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        assert peak_flops(torch.device("cuda")) == expected, name
    assert peak_flops(torch.device("cpu")) is None


def test_clock_excludes_time_from_throughput_but_not_from_the_time_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    clock.start(10)
    now = 107.0
    clock.exclude_time(7)  # before the first step: does not recur
    now = 127.0
    assert clock.window_seconds(14) == 20 and clock.seconds_left(20) == 20 / 4 * 6
    now = 135.0
    clock.exclude_time(8)
    now = 155.0
    assert clock.window_seconds(18) == 20 and clock.seconds_left(20) == 48 / 8 * 2
    assert clock.seconds_left(18) == 0


def test_peak_memory_of_this_process():
    assert 0.05 < peak_memory(torch.device("cpu")) < 64


def test_peak_memory_on_mps_is_the_allocated_memory(monkeypatch):
    """torch.accelerator has no memory statistics of MPS."""
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GIB)
    assert peak_memory(torch.device("mps")) == 3


def test_memory_estimate_adds_up_its_parts(tmp_path):
    model = tiny()
    training = checked(tmp_path).training
    estimate = estimate_memory(model, training, 1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (
        estimate.weights * GIB == estimate.gradients * GIB == 4 * count
        and estimate.optimizer * GIB == 8 * count
    )
    head = 4 * model.lm_head.weight.numel()
    assert estimate.head * GIB == head + 4 * VOCAB * 1000
    rows = TILE_BYTES["cpu"] // (4 * VOCAB)  # of the largest tile
    assert estimate_memory(model, training, 50 * rows).head * GIB == head + 4 * VOCAB * rows
    assert estimate_memory(model.bfloat16(), training, 1000).weights * GIB == 2 * count
    training.optim = type(training.optim)("sgd")
    assert estimate_memory(model, training, 1000).optimizer is None
    assert str(MemoryEstimate(2.0, 1.0, None, 0.25)) == (
        "about 3.2 GiB per device before activations: weights 2.0 GiB, gradients 1.0 GiB, optimizer not "
        "counted, loss 256 MiB"
    )
