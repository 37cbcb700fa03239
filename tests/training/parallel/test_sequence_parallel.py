"""Models, datasets and objectives that sequence parallelism rejects."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dft.data.batches.collator import FlatCollator, PaddedCollator
from dft.loss.objectives import make_objective
from dft.training.attention.interface import VARLEN
from dft.training.parallel import sequence_parallel
from dft.training.parallel.sequence_parallel import (
    SequenceParallel,
    check_shared_data,
    resolve_parallel_collator,
    sequence_parallel_obstacle,
)
from scripts.bench.bench_waits import HostWaits


def meta_model(**settings):
    config = Qwen3Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=50, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **settings,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("rope", "name"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, None),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic"),
        (
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
             "factor": 2.0, "original_max_position_embeddings": 64},
            "longrope",
        ),
    ],
    ids=["default", "linear", "dynamic", "longrope"],
)  # fmt: skip
def test_rotary_positions_that_depend_on_the_length_are_rejected(rope, name):
    """Each rank would derive different frequencies from the positions of its slice."""
    obstacle = sequence_parallel_obstacle(meta_model(rope_parameters=rope), 2)
    assert obstacle is None if name is None else f"its rotary positions ({name})" in obstacle


def test_configurations_without_required_fields_are_rejected(monkeypatch):
    monkeypatch.setattr(sequence_parallel, "packing_obstacle", lambda model: None)
    with torch.device("meta"):
        gpt = GPT2LMHeadModel._from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert "num_key_value_heads" in sequence_parallel_obstacle(gpt, 2)
    config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=None, sliding_window=None)
    config._attn_implementation = "sdpa"
    model = SimpleNamespace(config=config)
    assert (sequence_parallel_obstacle(model, 2) is None) == (config.to_dict()["head_dim"] is not None)


SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 50,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 2, "num_key_value_heads": 4,
}  # fmt: skip
SINKS = "its heads have attention sinks"
DIFFERENT = "its heads differ between queries and values, or between layers"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: GptOssForCausalLM(GptOssConfig(**SHAPE, **EXPERTS, head_dim=8, sliding_window=4)), SINKS),
        (lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **LATENT})), DIFFERENT),
        (
            lambda: Gemma4ForCausalLM(
                Gemma4TextConfig(
                    **SHAPE, head_dim=8, global_head_dim=16, sliding_window=4, hidden_size_per_layer_input=0,
                    layer_types=["sliding_attention", "full_attention"],
                )
            ),
            DIFFERENT,
        ),
    ],
    ids=["gpt-oss", "deepseek v3", "gemma4"],
)  # fmt: skip
def test_heads_that_deepspeed_cannot_exchange_are_rejected(build, reason):
    with torch.device("meta"):
        model = build()
    model.set_attn_implementation(VARLEN)
    assert sequence_parallel_obstacle(model, 2).startswith(reason)


class Stream(IterableDataset):
    def __iter__(self):
        yield {"input_ids": [1, 2], "labels": [1, 2]}


def test_datasets_without_a_length_and_objectives_with_a_base_model_are_rejected():
    check_shared_data([{}], make_objective("dft"))
    with pytest.raises(ValueError, match="a dataset without a length"):
        check_shared_data(Stream(), make_objective("dft"))
    with pytest.raises(ValueError, match="objective asft scores whole sequences with the base model"):
        check_shared_data([{}], make_objective("asft"))


@pytest.mark.parametrize("collator", [PaddedCollator, FlatCollator])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_the_collator_gives_each_rank_the_positions_of_its_labels_without_a_wait(collator, size):
    """`SequenceParallel.local_slice` runs on the device, where looking for them would wait."""
    examples = [
        {"input_ids": list(range(1, length + 1)), "labels": [-100, *range(2, length), -100]}
        for length in (5, 9, 2, 4)
    ]
    arguments = (0, size) if collator is PaddedCollator else (size,)
    batch = collator(*arguments)(examples)
    without = {name: value for name, value in batch.items() if not name.startswith("share_")}
    for rank in range(size):
        sequences = SequenceParallel.__new__(SequenceParallel)
        sequences.size, sequences.rank = size, rank
        waits = HostWaits()
        with waits.counting():
            share = sequences.local_slice(batch)
        assert not waits.places
        expected = (share["labels"].flatten() != -100).nonzero().squeeze(1)
        assert torch.equal(share["loss_positions"], expected)
        assert torch.equal(sequences.local_slice(without)["loss_positions"], expected)
        assert not any(name.startswith("share_") for name in share)


def test_the_collator_of_the_trainer_knows_the_number_of_ranks(monkeypatch):
    model = meta_model()
    assert resolve_parallel_collator(model, 7, None, False, 4) == PaddedCollator(7, 4)
    monkeypatch.setattr(model.config, "_attn_implementation", VARLEN)
    assert resolve_parallel_collator(model, 7, None, True, 4) == FlatCollator(4)
