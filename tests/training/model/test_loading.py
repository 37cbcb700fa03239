"""Load models; faults of their files are reported in one message."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dft.errors import UserError
from dft.evaluation.sampling import load_for_sampling
from dft.training.model.loading import load_base_model, load_meta_model, load_model
from tests.families import make_family
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


def test_adapters_leave_the_embeddings_of_a_tokenizer_without_new_tokens_frozen(folder):
    flags = arguments(folder, "--lora_r", "4")
    model = load_model(flags, AutoTokenizer.from_pretrained(folder))
    assert not model.get_input_embeddings().weight.requires_grad and flags.new_tokens == []


@pytest.fixture
def tokenizer_with_unused_ids(folder):
    """The tokenizer of `folder` with one token more, whose id leaves 10 ids before it unused."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    high = len(content["model"]["vocab"]) + 10
    content["model"]["vocab"]["<|high|>"] = high
    content["added_tokens"].append({**content["added_tokens"][0], "id": high, "content": "<|high|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_embeddings_reach_up_to_the_largest_id_of_a_tokenizer_with_unused_ids(
    folder, tokenizer_with_unused_ids
):
    tokenizer = tokenizer_with_unused_ids
    high = tokenizer.convert_tokens_to_ids("<|high|>")
    assert high == len(tokenizer) + 9
    model = load_model(arguments(folder), tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == high + 1
    assert torch.isfinite(model(torch.tensor([[high]])).logits).all()


def test_base_model_without_an_embedding_of_the_largest_id_is_an_error(folder, tokenizer_with_unused_ids):
    """The base model has more embeddings than the tokenizer has tokens, but not for the largest id."""
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(tokenizer_with_unused_ids) + 5
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    flags = arguments(folder, "--objective", "asft")
    for load_or_plan in (load_base_model, load_meta_model):
        with pytest.raises(UserError, match="the base model has no embeddings for 1 tokens of the tokenizer"):
            load_or_plan(flags, tokenizer_with_unused_ids)


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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3"])
def test_an_architecture_that_is_not_a_language_model_is_named_in_one_line(
    tokenizer_folder, tmp_path, family
):
    """transformers' message lists more than a hundred classes."""
    folder = make_family(family, tokenizer_folder, tmp_path / family)
    for attempt in (load, lambda folder: load_meta_model(arguments(folder))):
        with pytest.raises(UserError, match=r"its architecture \(\w+Config\) is not one that") as raised:
            attempt(folder)
        assert len(str(raised.value)) < 500
    with pytest.raises(UserError, match=r"--model \S+: cannot be loaded: its architecture"):
        load_for_sampling(str(folder), "auto", False)


def test_adapters_without_peft_are_one_error_that_names_the_package(tmp_path, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("dft.arguments.lora.version", missing)
    with pytest.raises(UserError, match="holds adapters: peft is not installed; pip install peft=="):
        load_for_sampling(str(tmp_path), "auto", False)
