"""The weights that are trained are checked in the dtype that they have, not the one that a flag names."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.errors import UserError
from dft.training.model.loading import load_meta_model, load_model
from dft.training.model.precision import dtype_notes, trained_dtypes
from tests.training.model.loading_helpers import arguments

LOST = {"bfloat16": "1/256", "float16": "1/2,048"}


@pytest.fixture
def saved_as(folder):
    """Convert the weights of `folder` and return it."""

    def convert(dtype: str):
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        return folder

    return convert


def notes(folder, *more: str, load=load_model) -> list[str]:
    parsed = arguments(folder, *more)
    tokenizer = [AutoTokenizer.from_pretrained(folder)] if load is load_model else []
    load(parsed, *tokenizer)
    return [note for note in parsed.notes if "dtype" in note or "weights" in note]


@pytest.mark.parametrize("dtype", LOST)
@pytest.mark.parametrize("load", [load_model, load_meta_model])
def test_half_precision_weights_get_a_note_however_they_were_asked_for(saved_as, dtype, load):
    folder = saved_as(dtype)
    loss = (
        f"{dtype}; without --deepspeed there are no float32 master weights, and updates below about "
        f"{LOST[dtype]} of a weight are lost; for small learning rates use --torch_dtype float32 with --bf16 "
        "True"
    )
    assert notes(folder, "--torch_dtype", "auto", load=load) == [
        f"--torch_dtype auto: the weights of {folder} are {loss}"
    ]
    assert notes(folder, "--torch_dtype", dtype, load=load) == [f"--torch_dtype {loss}"]


def test_float32_weights_get_no_note(saved_as):
    folder = saved_as("bfloat16")
    assert notes(folder) == []
    assert notes(saved_as("float32"), "--torch_dtype", "auto") == []


def test_a_dtype_that_was_not_used_is_reported(folder):
    """Under ZeRO-3, transformers loads float32 weights unless the run computes in half precision."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (note,) = dtype_notes(model, arguments(folder, "--torch_dtype", "bfloat16"))
    assert note == (
        "--torch_dtype bfloat16 has no effect: under ZeRO-3 transformers loads weights in the dtype of "
        "--bf16 or --fp16, and float32 without them"
    )


def test_adapters_on_half_precision_weights_are_float32(saved_as):
    folder = saved_as("bfloat16")
    parsed = arguments(folder, "--torch_dtype", "auto", "--lora_r", "2")
    model = load_model(parsed, AutoTokenizer.from_pretrained(folder))
    assert trained_dtypes(model) == {torch.float32} and not any("lost" in note for note in parsed.notes)


def test_float16_weights_of_the_checkpoint_cannot_be_trained_with_a_loss_scale(saved_as):
    message = r"--torch_dtype auto: the weights of .* are float16 with --fp16 True: the gradients of float16"
    with pytest.raises(UserError, match=message):
        notes(saved_as("float16"), "--torch_dtype", "auto", "--fp16", "True")
    assert notes(saved_as("float32"), "--torch_dtype", "auto", "--fp16", "True") == []
