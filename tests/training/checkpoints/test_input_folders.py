"""No run writes into the folder of its model or data, however the flags spell it."""

import os
from pathlib import Path

import pytest

from dft.errors import UserError
from tests.arguments.command import checked

MODEL = {"config.json": "{}", "model.safetensors": "weights"}


def folder_with(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path) -> Path:
    return folder_with(tmp_path / "model", MODEL)


def relative(model: Path, monkeypatch) -> str:
    monkeypatch.chdir(model.parent)
    return "model/"


def link(model: Path, monkeypatch) -> str:
    link = model.with_name("link")
    link.symlink_to(model)
    return str(link)


def tilde(model: Path, monkeypatch) -> str:
    monkeypatch.setenv("HOME", str(model.parent))
    return "~/model"


def detour(model: Path, monkeypatch) -> str:
    return f"{model}/../model"


@pytest.mark.parametrize("spell", [relative, link, tilde, detour, lambda model, _: str(model)])
@pytest.mark.parametrize("flags", [[], ["--lora_r", "4"], ["--prepare_only", "True"]])
def test_the_folder_of_the_model_is_not_written_to(tmp_path, model, monkeypatch, spell, flags):
    pytest.importorskip("peft")
    output = spell(model, monkeypatch)
    for name, target in ((str(model), output), (output, str(model))):
        with pytest.raises(UserError, match=r"--output_dir \S+: is the folder of --model_name_or_path"):
            checked(tmp_path, "--model_name_or_path", name, "--output_dir", target, *flags)
    assert contents(model) == MODEL


@pytest.mark.parametrize("flag", ["output_dir", "data_cache_dir", "logging_dir"])
def test_a_sub_folder_of_the_model_is_not_written_to(tmp_path, model, flag):
    with pytest.raises(
        UserError, match=rf"--{flag} \S+model/new: is inside the folder of --model_name_or_path"
    ):
        checked(tmp_path, "--model_name_or_path", str(model), f"--{flag}", str(model / "new"))
    assert not (model / "new").exists()


def test_the_checkpoint_to_resume_from_is_not_written_into(tmp_path):
    checkpoint = folder_with(tmp_path / "run" / "checkpoint-5", MODEL)
    with pytest.raises(UserError, match="is the folder of --resume_from_checkpoint"):
        checked(tmp_path, "--resume_from_checkpoint", str(checkpoint), "--output_dir", str(checkpoint))


@pytest.mark.parametrize("place", ["checkpoint-5", "incomplete-model", "checkpoint-5/best"])
@pytest.mark.parametrize("flags", [["--overwrite_output_dir", "True"], ["--resume_from_checkpoint", "auto"]])
def test_a_model_that_the_run_would_remove_is_rejected(tmp_path, place, flags):
    model = folder_with(tmp_path / "out" / place, MODEL)
    with pytest.raises(UserError, match=rf"is in {place.split('/')[0]} of --output_dir"):
        checked(tmp_path, "--model_name_or_path", str(model), *flags)


def test_a_model_elsewhere_in_the_output_folder_is_accepted(tmp_path):
    model = folder_with(tmp_path / "out" / "model", MODEL)
    assert checked(tmp_path, "--model_name_or_path", str(model)).training.output_dir == str(tmp_path / "out")


@pytest.mark.parametrize("flag", ["--data_files", "--eval_data_files"])
@pytest.mark.parametrize("value", ["a.jsonl", "*.jsonl", "."])
def test_the_folder_of_the_data_is_not_written_to(tmp_path, flag, value):
    data = folder_with(tmp_path / "data", {"a.jsonl": "{}"})
    named = os.path.normpath(data / value)
    with pytest.raises(UserError, match=rf"--output_dir \S+data: is the folder of {flag}"):
        checked(tmp_path, flag, named, "--output_dir", str(data))
    assert contents(data) == {"a.jsonl": "{}"}


@pytest.mark.parametrize("flag", ["output_dir", "data_cache_dir", "logging_dir"])
def test_files_of_a_run_do_not_become_data(tmp_path, flag):
    data = folder_with(tmp_path / "data", {"a.jsonl": "{}"})
    with pytest.raises(UserError, match=rf"--{flag} \S+ is inside --data_files .* would be read as data"):
        checked(tmp_path, "--data_files", str(data), f"--{flag}", str(data / "runs"))
    hidden = str(data / ".runs")  # hidden folders are not read
    assert checked(tmp_path, "--data_files", str(data), f"--{flag}", hidden).data.data_files == [str(data)]


def test_data_that_the_run_would_remove_is_rejected(tmp_path):
    data = folder_with(tmp_path / "out" / "checkpoint-5", {"a.jsonl": "{}"})
    with pytest.raises(UserError, match="is in checkpoint-5 of --output_dir"):
        checked(tmp_path, "--data_files", str(data / "a.jsonl"), "--overwrite_output_dir", "True")


@pytest.mark.parametrize("flag", ["data_cache_dir", "logging_dir"])
@pytest.mark.parametrize("place", ["checkpoint-5", "checkpoint-5/cache", "incomplete-5/cache"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_in_a_checkpoint_of_the_run_is_not_written_to(tmp_path, monkeypatch, flag, place, exists):
    """Rotation would remove it."""
    if exists:
        (tmp_path / "out" / place).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (str(tmp_path / "out" / place), f"~/out/{place}"):
        with pytest.raises(
            UserError, match=rf"--{flag} \S+: is in {place.split('/')[0]} of --output_dir \S+out"
        ):
            checked(tmp_path, f"--{flag}", folder, "--overwrite_output_dir", "True")
    elsewhere = str(tmp_path / "out" / "cache")
    assert (
        checked(tmp_path, f"--{flag}", elsewhere, "--overwrite_output_dir", "True").flags[flag] == elsewhere
    )


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_a_model_of_another_origin_is_not_replaced(tmp_path, config):
    output = folder_with(tmp_path / "out", {config: "{}", "model-00001-of-00002.safetensors": "weights"})
    with pytest.raises(UserError, match=r"holds a model \(model-00001-of-00002.safetensors\) that no run"):
        checked(tmp_path)
    assert checked(tmp_path, "--overwrite_output_dir", "True").training.overwrite_output_dir
    (output / "run_args.yaml").write_text("")  # as an earlier run in this folder leaves it
    assert not checked(tmp_path).training.overwrite_output_dir


def test_a_plan_writes_nothing_and_may_name_the_folder_of_the_model(tmp_path, model):
    words = ["--model_name_or_path", str(model), "--output_dir", str(model), "--plan", "True"]
    assert checked(tmp_path, *words).watch.plan
