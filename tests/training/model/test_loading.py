"""Loading a model: attention and dtype as asked for or explained, and no weight left to chance."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from dft.arguments.parser import parse_arguments
from dft.errors import UserError
from dft.training.model.loading import (
    add_stop_tokens,
    check_positions,
    load_model,
    resolve_attention,
    resolve_dtype,
    settle_generation_config,
)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A tiny model with the tokenizer of the tests, which fits it exactly."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def arguments(folder, *more: str):
    words = [
        "--model_name_or_path",
        str(folder),
        "--data_files",
        "a.jsonl",
        "--output_dir",
        str(folder / "out"),
    ]
    return parse_arguments([*words, "--use_cpu", "True", *more])


def load(folder, *more: str):
    return load_model(arguments(folder, *more), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], torch.float32),
        (["--bf16", "True"], torch.float32),
        (["--torch_dtype", "bfloat16"], torch.bfloat16),
        (["--torch_dtype", "auto"], torch.float32),
    ],
)
def test_weights_are_float32_unless_asked_otherwise(folder, flags, dtype):
    model = load(folder, *flags)
    assert model.dtype == dtype
    assert model.config._attn_implementation == "sdpa"


def test_under_deepspeed_weights_have_the_dtype_it_computes_in(folder):
    given = arguments(folder, "--bf16", "True")
    given.training.deepspeed = "some.json"
    assert resolve_dtype(given) == torch.bfloat16


def test_flash_attention_on_cpu_names_the_remedy(folder):
    with pytest.raises(
        UserError, match="needs a CUDA GPU, and this run is on CPU; use --attn_implementation auto"
    ):
        resolve_attention(arguments(folder, "--attn_implementation", "flash_attention_2"))


def on_gpu(folder, monkeypatch, *more: str, installed: bool):
    given = arguments(folder, *more)
    given.training.use_cpu = False
    monkeypatch.setattr("dft.training.model.loading.is_flash_attn_2_available", lambda: installed)
    return given


def test_auto_takes_flash_attention_where_it_works(folder, monkeypatch):
    halves = on_gpu(folder, monkeypatch, "--bf16", "True", installed=True)
    assert resolve_attention(halves) == "flash_attention_2"
    assert resolve_attention(on_gpu(folder, monkeypatch, installed=True)) == "auto"  # float32
    assert resolve_attention(on_gpu(folder, monkeypatch, "--bf16", "True", installed=False)) == "auto"
    assert resolve_attention(arguments(folder, "--bf16", "True")) == "auto"  # CPU


@pytest.mark.parametrize(
    ("flags", "installed", "message"),
    [
        (["--bf16", "True"], False, "flash-attn is not installed.*--build-flash-attn"),
        ([], True, "bfloat16 or float16 only; add --bf16 True"),
    ],
)
def test_flash_attention_that_cannot_work_is_refused(folder, monkeypatch, flags, installed, message):
    given = on_gpu(
        folder, monkeypatch, "--attn_implementation", "flash_attention_2", *flags, installed=installed
    )
    with pytest.raises(UserError, match=message):
        resolve_attention(given)


def test_weights_that_are_missing_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are not in its files.*model.layers.0.mlp.up_proj.weight"):
        load(folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "foo"), ("num_hidden_layers", "x")])
def test_a_config_that_makes_no_sense_is_one_message(folder, key, value):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(arguments(folder), tokenizer)


def test_truncated_weights_are_one_message(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_tokens_added_to_the_tokenizer_get_a_row_and_a_note(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]}, replace_extra_special_tokens=False)
    given = arguments(folder)
    model = load_model(given, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == before + 1 == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model.lm_head.weight).all()
    assert (
        given.notes[-1] == f"embeddings: {before} -> {before + 1} rows, for the tokens added to the tokenizer"
    )


def test_a_tokenizer_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] -= 50
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:-50].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="they do not belong together"):
        load(folder)


def test_generation_also_stops_where_training_turns_end(folder, tokenizer):
    given, model = arguments(folder), load(folder)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    add_stop_tokens(model, tokenizer, ["<|im_end|>"], given)  # the tokenizer's own eos: no news
    assert not any("stops at" in note for note in given.notes)
    add_stop_tokens(model, tokenizer, ["<|im_end|>", "<|end|>"], given)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|end|>"])
    assert model.generation_config.eos_token_id == sorted(ids)
    assert "the saved model also stops at <|end|>," in given.notes[-1]


def test_generation_settings_that_transformers_would_not_save_are_settled_at_the_start(folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    given = arguments(folder)
    model = load_model(given, AutoTokenizer.from_pretrained(folder))
    assert not model.generation_config.do_sample and model.generation_config.temperature is None
    assert (
        "generation_config.json: saved without temperature, which do_sample false ignores" in given.notes[-1]
    )
    model.save_pretrained(folder / "saved")  # raised before


def test_generation_settings_that_cannot_be_saved_at_all_are_refused(folder):
    given, model = arguments(folder), load(folder)
    model.generation_config.num_return_sequences = 5  # of one beam, without sampling: refused
    model.generation_config.max_new_tokens = -1  # refused with sampling too
    with pytest.raises(UserError, match="its generation_config.json could not be saved again"):
        settle_generation_config(model, given)


def test_an_unknown_attention_is_refused_by_its_own_name(folder):
    with pytest.raises(UserError, match="--attn_implementation nonsense: no such attention; choose auto, "):
        resolve_attention(arguments(folder, "--attn_implementation", "nonsense"))


def test_a_fault_that_is_not_the_models_keeps_its_traceback(folder, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("dft.training.model.loading.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(folder)


def test_a_sequence_beyond_the_learned_positions_is_refused(folder):
    given = arguments(folder, "--max_length", "64")
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    check_positions(learned, 32, given)
    with pytest.raises(
        UserError, match="--max_length 64: the longest sequence has 33 tokens.*at most --max_length 32"
    ):
        check_positions(learned, 33, given)
    rotary = load(folder)
    rotary.config.max_position_embeddings = 32
    check_positions(rotary, 33, given)  # rotary positions go on
    assert (
        given.notes[-1] == "the longest sequence has 33 tokens, more than the 32 that the model was made for"
    )
