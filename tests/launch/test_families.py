"""Models whose weights are named, fused or wrapped differently on disk and in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families import make_family, quantize_experts, weight_names
from tests.launching import ROOT, train_records
from tests.reliability.selecting import mostly_slow

FORMS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "ddp": (2, {}),
    "zero3": (2, {"deepspeed": ROOT / "ds_config/zero3.json"}),
    "fsdp": (2, {"fsdp": True}),
}
TEXT = ("llama", "gpt2", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def train(example, forks, tmp_path_factory):
    """Train a family in a parallel form, and return the folder of the model that it began with."""
    models = tmp_path_factory.mktemp("families")

    def run(family: str, form: str, output: Path, **flags: object) -> Path:
        model = models / family
        if not model.exists():
            make_family(family, example.model, model)
        ranks, more = FORMS[form]
        settings = {
            "model_name_or_path": model, "eval_data_files": None, "max_steps": 1, "use_cpu": True,
            "per_device_train_batch_size": 16 // ranks, "max_train_samples": 64, **more, **flags,
        }  # fmt: skip
        codes, printed = forks.run(example.words(output, **settings), ranks)
        assert not any(codes), printed
        return model

    return run


@pytest.mark.parametrize(
    ("family", "form"),
    mostly_slow(
        [(family, form) for family in (*TEXT, "gemma3") for form in FORMS],
        [("gpt2", "fsdp"), ("gemma3", "zero3"), ("qwen3_moe", "zero3")],
    ),
)
def test_saved_weights_have_the_names_of_the_loaded_model(train, tmp_path, family, form):
    model = train(family, form, tmp_path / "run")
    assert weight_names(tmp_path / "run") == weight_names(model)


def test_files_of_the_model_are_saved_and_what_is_left_out_is_reported(example, forks, tmp_path):
    model = make_family("qwen3_5", example.model, tmp_path / "model")
    files = {"preprocessor_config.json": '{"image_processor_type": "Own"}', "LICENSE": "the license"}
    for name, content in files.items():
        (model / name).write_text(content)
    flags = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "max_train_samples": 16}
    words = example.words(tmp_path / "run", model_name_or_path=model, eval_data_files=None, **flags)
    codes, printed = forks.run(words)
    assert codes == [0], printed
    assert "21 weights that its text part does not use (model.visual)" in printed
    for name, content in files.items():
        for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
            assert (folder / name).read_text() == content
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]


@pytest.mark.parametrize(
    ("family", "form"),
    mostly_slow(
        [(family, form) for family in ("gpt2", "qwen3_moe", "gemma3") for form in FORMS],
        [("qwen3_moe", "single"), ("gemma3", "fsdp")],
    ),
)
def test_weights_that_are_converted_when_loaded_are_resumed(train, tmp_path, family, form):
    """Trainer alone would resume with the weights that the run began with."""
    flags = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    train(family, form, tmp_path / "whole", max_steps=4, **flags)
    train(family, form, tmp_path / "run", max_steps=2, **flags)
    train(family, form, tmp_path / "run", max_steps=4, resume_from_checkpoint="auto", **flags)
    whole, resumed = (train_records(tmp_path / name) for name in ("whole", "run"))
    assert [record["nll"] for record in resumed] == [record["nll"] for record in whole]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for name, weight in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_weights_in_4_bits_are_dequantized_trained_and_resumed(train, example, tmp_path, form):
    model = make_family("gpt_oss", example.model, tmp_path / "model")
    names, experts = weight_names(model), quantize_experts(model)
    flags = {"model_name_or_path": model, "dequantize": True, "save_strategy": "steps", "save_steps": 2}
    flags |= {"lr_scheduler_type": "constant"}
    train("gpt_oss", form, tmp_path / "whole", max_steps=4, **flags)
    train("gpt_oss", form, tmp_path / "run", max_steps=2, **flags)
    train("gpt_oss", form, tmp_path / "run", max_steps=4, resume_from_checkpoint="auto", **flags)
    assert weight_names(tmp_path / "run") == weight_names(tmp_path / "run" / "checkpoint-2") == names
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    for name, weight in experts.items():
        moved = (whole[name] - weight).abs().max()
        assert 0 < moved < 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize("form", ["single", "zero3"])
def test_adapters_of_weights_in_4_bits_are_verified_and_merged(train, example, tmp_path, form):
    pytest.importorskip("peft")
    model = make_family("gpt_oss", example.model, tmp_path / "model")
    names, experts = weight_names(model), quantize_experts(model)
    flags = {"model_name_or_path": model, "dequantize": True, "lora_r": 2, "torch_dtype": "bfloat16"}
    train("gpt_oss", form, tmp_path / "run", **flags, bf16=True)
    command = [sys.executable, ROOT / "scripts/merge_lora.py", tmp_path / "run", tmp_path / "merged"]
    merged = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert merged.returncode == 0, merged.stderr
    assert weight_names(tmp_path / "merged") == names
    weights = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(weights[name].float(), weight) for name, weight in experts.items())


@pytest.mark.parametrize("family", mostly_slow(["qwen3_moe", "gemma3", "gpt2"], ["qwen3_moe"]))
def test_the_best_model_is_loaded_with_converted_weights(train, example, tmp_path, family):
    train(
        family, "single", tmp_path, max_steps=4, learning_rate=0.3, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, eval_data_files=example.eval, max_eval_samples=8,
        load_best_model_at_end=True, metric_for_best_model="eval_nll", lr_scheduler_type="constant",
    )  # fmt: skip
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name != "checkpoint-4"
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in load_file(best / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("form", mostly_slow(FORMS, ["zero3"]))
def test_parts_that_text_does_not_reach_stay_as_they_are(train, tmp_path, form):
    """DeepSpeed applies weight decay to weights without a gradient, too."""
    model = train("gemma3", form, tmp_path / "run", weight_decay=0.5, learning_rate=0.1)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "run"))
    unchanged = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    parts = ("vision_tower.", "multi_modal_projector.")
    assert unchanged == {name for name in before if name.startswith(parts)}
