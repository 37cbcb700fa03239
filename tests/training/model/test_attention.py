"""Resolution of the dtype and the attention implementation."""

import pytest
import torch

from dft.errors import UserError
from dft.training.model.attention import resolve_attention, resolve_dtype
from tests.training.model.loading_helpers import arguments, load


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], torch.float32),
        (["--bf16", "True"], torch.float32),
        (["--torch_dtype", "bfloat16"], torch.bfloat16),
        (["--torch_dtype", "auto"], torch.float32),
    ],
)
def test_weights_are_float32_by_default(folder, flags, dtype):
    model = load(folder, *flags)
    assert model.dtype == dtype
    assert model.config._attn_implementation == "varlen"


def test_weights_have_the_compute_dtype_under_deepspeed(folder):
    parsed = arguments(folder, "--bf16", "True")
    parsed.training.deepspeed = "some.json"
    assert resolve_dtype(parsed) == torch.bfloat16


def test_flash_attention_on_cpu_is_an_error(folder):
    with pytest.raises(
        UserError, match="needs a CUDA GPU, and this run is on CPU; use --attn_implementation auto"
    ):
        resolve_attention(arguments(folder, "--attn_implementation", "flash_attention_2"))


def on_gpu(folder, monkeypatch, *more: str, installed: bool):
    parsed = arguments(folder, *more)
    parsed.training.use_cpu = False
    monkeypatch.setattr("dft.training.model.attention.is_flash_attn_2_available", lambda: installed)
    return parsed


def test_auto_selects_flash_attention_if_it_works(folder, monkeypatch):
    half = on_gpu(folder, monkeypatch, "--bf16", "True", installed=True)
    assert resolve_attention(half) == "flash_attention_2"
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
def test_flash_attention_that_cannot_work_is_an_error(folder, monkeypatch, flags, installed, message):
    parsed = on_gpu(
        folder, monkeypatch, "--attn_implementation", "flash_attention_2", *flags, installed=installed
    )
    with pytest.raises(UserError, match=message):
        resolve_attention(parsed)


def test_unknown_attention_is_an_error(folder):
    with pytest.raises(UserError, match="--attn_implementation nonsense: no such attention; choose auto, "):
        resolve_attention(arguments(folder, "--attn_implementation", "nonsense"))
