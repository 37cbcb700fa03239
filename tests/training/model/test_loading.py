"""Load models; faults of their files are reported in one message."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dft.errors import UserError
from dft.training.model.loading import load_model
from tests.training.model.loading_helpers import arguments, load


def test_missing_weights_are_an_error(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are not in its files.*model.layers.0.mlp.up_proj.weight"):
        load(folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "foo"), ("num_hidden_layers", "x")])
def test_invalid_config_values_are_an_error(folder, key, value):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(arguments(folder), tokenizer)


def test_truncated_weights_are_an_error_of_one_line(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_tokens_added_to_the_tokenizer_get_embeddings_and_a_note(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]}, replace_extra_special_tokens=False)
    flags = arguments(folder)
    model = load_model(flags, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == before + 1 == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model.lm_head.weight).all()
    assert (
        flags.notes[-1] == f"embeddings: {before} -> {before + 1} rows, for the tokens added to the tokenizer"
    )


def test_tokenizer_of_a_different_model_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] -= 50
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:-50].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="they do not belong together"):
        load(folder)


def test_out_of_memory_while_loading_keeps_its_traceback(folder, monkeypatch):
    def out_of_memory(*_args, **_options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("dft.training.model.loading.AutoModelForCausalLM.from_pretrained", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load(folder)
