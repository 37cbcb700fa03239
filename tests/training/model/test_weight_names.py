"""Names of weights: those in files, those that are loaded, and those that are saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dft.training.model.weight_names import expected_names, load_weights, source_names
from dft.training.patches import keep_source_names
from tests.families import FAMILIES, make_family, weight_names

LOADABLE = ("llama", "gpt2", "qwen3_moe", "deepseek_v3", "gemma3")


@pytest.fixture(scope="module")
def families(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: make_family(family, tokenizer_folder, folder / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_read_from_one_file_or_from_an_index(families, tmp_path, family):
    names = weight_names(families[family])
    assert source_names(str(families[family])) == names
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert source_names(str(tmp_path)) == names


@pytest.mark.parametrize("name", ["", "/nowhere/model", "no/such-model"])
def test_a_model_without_files_has_no_names(name):
    assert source_names(name) is None


def test_names_of_quantized_files_are_not_those_of_the_model(families, tmp_path):
    for file in families["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    assert source_names(str(tmp_path)) is None


@pytest.mark.parametrize("family", LOADABLE)
def test_a_saved_model_has_the_names_of_its_source(families, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(families[family])
    keep_source_names(model, source_names(str(families[family])))
    model.save_pretrained(tmp_path)
    assert weight_names(tmp_path) == weight_names(families[family]) <= expected_names(model)


def test_either_of_two_tied_weights_may_be_saved(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert expected_names(model) - source_names(str(tmp_path)) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LOADABLE)
def test_weights_are_loaded_exactly_into_a_model_in_memory(families, tmp_path, family, dtype):
    model = AutoModelForCausalLM.from_pretrained(families[family], dtype=dtype)
    keep_source_names(model, source_names(str(families[family])))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    random = torch.get_rng_state()
    assert load_weights(model, tmp_path) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_weights_that_a_checkpoint_lacks_are_named(families, tmp_path):
    small = AutoModelForCausalLM.from_pretrained(families["llama"], num_hidden_layers=1)
    small.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(families["llama"])
    missing = load_weights(model, tmp_path)
    assert missing and all(name.startswith("model.layers.1.") for name in missing)
