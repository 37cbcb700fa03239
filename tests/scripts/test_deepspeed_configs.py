"""Every DeepSpeed configuration matches its name, defers to the flags, and can be saved."""

import json

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.launching import ROOT

CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "ds_config").glob("*.json"))}


def test_every_stage_has_a_configuration():
    stages = {name: config["zero_optimization"]["stage"] for name, config in CONFIGS.items()}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_controlled_by_flags_are_auto(name):
    config = CONFIGS[name]
    for key in (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping",
    ):  # fmt: skip
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_zero3_gathers_the_weights_it_saves(name):
    assert CONFIGS[name]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("name", CONFIGS)
def test_every_zero_setting_is_known_to_deepspeed(name):
    settings = CONFIGS[name]["zero_optimization"].items()
    DeepSpeedZeroConfig(**{key: value for key, value in settings if value != "auto"})
    fields = {field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items()}
    assert {key for key, _ in settings} <= fields
