"""Generation settings of saved models."""

import pytest
from transformers import AutoTokenizer, GenerationConfig

from dft.errors import UserError
from dft.training.model.generation import add_stop_tokens, resolve_generation_config
from dft.training.model.loading import load_model
from tests.training.model.loading_helpers import arguments, load


def test_generation_stops_at_the_tokens_that_end_training_turns(folder, tokenizer):
    model = load(folder)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert add_stop_tokens(model, tokenizer, ["<|im_end|>"]) is None  # the end token of the tokenizer
    note = add_stop_tokens(model, tokenizer, ["<|im_end|>", "<|end|>"])
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|end|>"])
    assert model.generation_config.eos_token_id == sorted(ids)
    assert "the saved model also stops at <|end|>," in note


def test_generation_settings_that_transformers_would_not_save_are_dropped_at_the_start(folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    flags = arguments(folder)
    model = load_model(flags, AutoTokenizer.from_pretrained(folder))
    assert not model.generation_config.do_sample and model.generation_config.temperature is None
    assert (
        "generation_config.json: saved without temperature, which do_sample false ignores" in flags.notes[-1]
    )
    model.save_pretrained(folder / "saved")  # raised before


def test_resolve_generation_config_leaves_its_argument_alone():
    config = GenerationConfig(temperature=0.6)
    resolved, note = resolve_generation_config(config, "model")
    assert config.temperature == 0.6 and resolved.temperature is None and "temperature" in note
    assert resolve_generation_config(resolved, "model") == (resolved, None)


def test_generation_settings_that_cannot_be_saved_are_an_error():
    config = GenerationConfig()
    config.num_return_sequences = 5  # invalid for one beam without sampling
    config.max_new_tokens = -1  # invalid with sampling as well
    with pytest.raises(UserError, match="its generation_config.json could not be saved again"):
        resolve_generation_config(config, "model")
