"""Weights that are saved in 4 bits (MXFP4) are dequantized on request and saved so."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dft.errors import UserError
from dft.training.model import loading
from dft.training.model.loading import load_meta_model, load_model
from dft.training.model.quantized import resolve_loading
from tests.families import make_family, quantize_experts, weight_names
from tests.training.model.loading_helpers import arguments, load


@pytest.fixture(scope="module")
def plain(tokenizer_folder, tmp_path_factory):
    """The folder of a model that is not quantized."""
    return make_family("gpt_oss", tokenizer_folder, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantized(tokenizer_folder, tmp_path_factory):
    """The folder of a model in MXFP4, and its experts in float32."""
    folder = make_family("gpt_oss", tokenizer_folder, tmp_path_factory.mktemp("mxfp4"))
    return folder, quantize_experts(folder)


@pytest.mark.parametrize("read", [load, lambda folder: load_meta_model(arguments(folder))])
def test_weights_in_4_bits_are_an_error_that_names_the_flag(quantized, read):
    message = r"saved in 4 bits \(MXFP4\), which cannot be trained; --dequantize True converts them"
    with pytest.raises(UserError, match=message):
        read(quantized[0])


def test_dequantized_weights_have_the_values_of_their_codes(quantized):
    folder, experts = quantized
    model = load(folder, "--dequantize", "True")
    weights = dict(model.named_parameters())
    assert len(experts) == 4 and all(torch.equal(weights[name], value) for name, value in experts.items())
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in weights.values())
    shapes = load_meta_model(arguments(folder, "--dequantize", "True")).state_dict()
    assert {name: weight.shape for name, weight in shapes.items()} == {
        name: weight.shape for name, weight in model.state_dict().items()
    }


def test_dequantized_weights_are_saved_like_those_of_a_model_that_was_never_quantized(
    plain, quantized, tmp_path
):
    model = load(quantized[0], "--dequantize", "True", "--torch_dtype", "bfloat16")
    model.save_pretrained(tmp_path)
    assert weight_names(tmp_path) == weight_names(plain)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(reloaded[name], weight) for name, weight in model.state_dict().items())
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_adapters_on_all_linear_layers_leave_the_experts_out(quantized):
    pytest.importorskip("peft")
    model = load(quantized[0], "--dequantize", "True", "--lora_r", "2")
    trained = {name.split(".")[-4] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_note_says_that_zero3_ranks_load_all_weights(quantized, tokenizer, monkeypatch):
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    flags = arguments(quantized[0], "--dequantize", "True")
    load_model(flags, tokenizer)
    assert "--dequantize True: each rank loads all weights before ZeRO-3 shards them" in flags.notes


def test_the_flag_is_refused_where_it_has_no_effect_or_contradicts_another(plain, quantized):
    with pytest.raises(UserError, match="no effect: the weights of .* are not saved in MXFP4"):
        load(plain, "--dequantize", "True")
    contradicting = arguments(quantized[0], "--dequantize", "True")
    contradicting.lora.load_in_4bit = True
    with pytest.raises(UserError, match="--load_in_4bit True cannot be used with --dequantize True"):
        resolve_loading(contradicting)
