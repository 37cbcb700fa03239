"""Which models' sequences can be cut up, and what the trainer refuses to cut."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, Qwen3Config, Qwen3ForCausalLM

from dft.loss.objectives import make_objective
from dft.training.parallel import sequence_parallel
from dft.training.parallel.sequence_parallel import (
    check_sequence_parallel,
    sequence_parallel_obstacle,
)


def shapes(**given):
    config = Qwen3Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=50, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **given,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("rope", "told"),
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
def test_positions_that_depend_on_the_length_are_refused(rope, told):
    """A rank would rotate its stretch by frequencies that the others do not have."""
    found = sequence_parallel_obstacle(shapes(rope_parameters=rope), 2)
    assert found is None if told is None else f"its rotary positions ({told})" in found


def test_what_deepspeed_would_miss_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(sequence_parallel, "packing_obstacle", lambda model: None)
    with torch.device("meta"):
        gpt = GPT2LMHeadModel._from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert "num_key_value_heads" in sequence_parallel_obstacle(gpt, 2)
    config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=None, sliding_window=None)
    config._attn_implementation = "sdpa"
    model = SimpleNamespace(config=config)
    assert (sequence_parallel_obstacle(model, 2) is None) == (config.to_dict()["head_dim"] is not None)


class Stream(IterableDataset):
    def __iter__(self):
        yield {"input_ids": [1, 2], "labels": [1, 2]}


def test_streams_and_base_models_are_refused():
    check_sequence_parallel([{}], make_objective("dft"))
    with pytest.raises(ValueError, match="a dataset without a length"):
        check_sequence_parallel(Stream(), make_objective("dft"))
    with pytest.raises(ValueError, match="objective asft scores whole sequences with the base model"):
        check_sequence_parallel([{}], make_objective("asft"))
