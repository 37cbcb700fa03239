"""The configuration of `accelerate launch` becomes flags. accelerate itself makes the environment."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from dft.arguments.accelerate_launch import SWITCHES, check_device, launched_flags, launched_note
from dft.arguments.parser import Parser, default_flags
from dft.errors import UserError
from tests.arguments.command import words

DEEPSPEED = {"zero_stage": 3, "zero3_save_16bit_model": True, "offload_optimizer_device": "cpu"}
FSDP = {
    "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True, "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_transformer_layer_cls_to_wrap": "A,B",
}  # fmt: skip


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Set the environment variables of `accelerate launch` with a configuration; return the implied flags."""

    def read(flags: dict[str, Any] | None = None, **configuration: Any) -> dict[str, Any]:
        file = tmp_path / "accelerate.yaml"
        settings = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "num_machines": 1}
        file.write_text(yaml.safe_dump({**settings, "mixed_precision": "no", **configuration}))
        words = ["--config_file", str(file), "--main_process_port", "0", "train_dft.py"]
        args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
        args.deepspeed_fields_from_accelerate_config = ",".join(configuration.get("deepspeed_config", {}))
        is_deepspeed = configuration["distributed_type"] == "DEEPSPEED"
        environment = prepare_deepspeed_cmd_env(args)[1] if is_deepspeed else prepare_multi_gpu_env(args)
        for name, value in environment.items():
            if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
                monkeypatch.setenv(name, value)
        return launched_flags({**default_flags(), **(flags or {})})

    return read


def test_nothing_is_implied_without_accelerate():
    assert launched_flags(default_flags()) == {} and launched_note({}) is None


def test_deepspeed_settings_of_accelerate_become_a_configuration(launched):
    implied = launched(distributed_type="DEEPSPEED", deepspeed_config=DEEPSPEED)
    zero = implied["deepspeed"]["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert implied["deepspeed"]["gradient_clipping"] == "auto"  # --max_grad_norm has its effect
    assert implied["deepspeed"]["bf16"] == {"enabled": "auto"}
    note = "set by the configuration of accelerate launch: --deepspeed (ZeRO-3)"
    assert launched_note(implied) == note


def test_a_deepspeed_file_of_accelerate_is_the_flag(launched):
    file = str(Path("ds_config/zero2.json").resolve())
    implied = launched(distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": file})
    assert implied == {"deepspeed": file}


def test_the_command_line_takes_precedence(launched):
    flags = {"deepspeed": "mine.json", "fp16": True}
    configuration = {"deepspeed_config": DEEPSPEED, "mixed_precision": "bf16"}
    assert launched(flags, distributed_type="DEEPSPEED", **configuration) == {}


def test_fsdp_settings_of_accelerate_become_the_flag_and_its_configuration(launched):
    implied = launched(distributed_type="FSDP", fsdp_config=FSDP, mixed_precision="bf16")
    config = implied.pop("fsdp_config")
    assert implied == {"fsdp": True, "bf16": True}
    assert config["transformer_layer_cls_to_wrap"] == ["A", "B"]
    assert config["reshard_after_forward"].lower() == "true" and config["cpu_offload"] is False
    assert config["state_dict_type"] == "FULL_STATE_DICT"


def test_precision_and_compilation_of_accelerate_become_flags(launched):
    implied = launched(
        distributed_type="MULTI_CPU", mixed_precision="bf16", dynamo_config={"dynamo_backend": "INDUCTOR"}
    )
    assert implied == {"bf16": True, "torch_compile_backend": "inductor"}
    assert launched_note(implied) == (
        "set by the configuration of accelerate launch: --bf16 True, --torch_compile_backend inductor"
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported; use DeepSpeed or FSDP"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8 is not supported; use one of no, fp16"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1 is not supported; set fsdp_v"),
    ],
)
def test_what_is_not_supported_is_one_error(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"accelerate launch: {message}"):
        launched_flags(default_flags())


@pytest.mark.parametrize("value", ["meta", "cuda:7", "cuda", "nonsense", ""])
@pytest.mark.parametrize("prepare_only", ["True", "False"])
def test_another_device_in_the_environment_is_one_error(tmp_path, monkeypatch, value, prepare_only):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", value)
    flags = words(tmp_path, "--prepare_only", prepare_only)
    with pytest.raises(UserError) as raised:
        Parser().parse(flags)
    assert str(raised.value) == (
        f"the environment sets ACCELERATE_TORCH_DEVICE={value!r}, and this run uses the CPU; remove the "
        "variable (unset ACCELERATE_TORCH_DEVICE)"
    )
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    assert Parser().parse(flags).training.device.type == "cpu"


@pytest.mark.parametrize(
    ("value", "ranks", "message"),
    [
        ("cuda:1", None, "this run uses cuda:0; .* to train on another device, set CUDA_VISIBLE_DEVICES or"),
        ("cpu", None, "this run uses cuda:0"),
        ("cuda", None, ""),
        ("cuda:0", None, ""),
        ("cuda:0", "2", "this run uses one cuda device per rank"),
    ],
)
def test_a_device_in_the_environment_is_that_of_the_run(monkeypatch, value, ranks, message):
    """All ranks would otherwise train on the same GPU."""
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", value)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    if message:
        with pytest.raises(UserError, match=message):
            check_device(use_cpu=False)
    else:
        check_device(use_cpu=False)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_of_accelerate_that_is_no_boolean_is_one_error(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(UserError, match=f"sets {name}='maybe', which is neither true nor false; remove the"):
        Parser().parse(words(tmp_path))


def test_a_run_that_only_prepares_data_ignores_the_configuration(launched, tmp_path, monkeypatch):
    launched(distributed_type="DEEPSPEED", deepspeed_config=DEEPSPEED)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = Parser().parse(words(tmp_path, "--prepare_only", "True"))
    assert arguments.training.deepspeed is None and arguments.training.deepspeed_plugin is None
    assert "--prepare_only True ignores --deepspeed: it only prepares the data" in arguments.notes
