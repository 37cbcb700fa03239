"""Checks of the DeepSpeed configuration file against the flags."""

import json

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dft.arguments.deepspeed_file import find_deepspeed, read_deepspeed
from dft.arguments.parser import parse_arguments
from dft.errors import UserError
from dft.training.optimizer import check_operators
from tests.arguments.command import checked, words
from tests.combinations import refuses
from tests.launching import ROOT

AUTO = {"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}


def deepspeed_file(folder, **content) -> list[str]:
    (folder / "ds.json").write_text(json.dumps(content))
    return ["--deepspeed", str(folder / "ds.json")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}},
            "contradicts the flags: - ds train_micro_batch_size_per_gpu=3",
        ),
        ({"zero_optimization": {"stage": 2}}, "has no gradient_clipping, so flags of this run would have no"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}, **AUTO},
            "with 'zero_optimization: {compute_grad_norm: false}' a non-finite gradient would reach",
        ),
        pytest.param(
            {"zero_optimization": {"stage": 2}, **AUTO, "tensor_parallel": {"autotp_size": 2}},
            "tensor parallelism is not supported",
            marks=refuses("not supported", {"tensor_parallel": 2}, 2),
        ),
        ({"zero_optimization": {"stage": 3}, **AUTO}, "stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_contradicting_deepspeed_files_are_rejected(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("WORLD_SIZE", "1")
    # A refusal needs no process group.
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    with pytest.raises(UserError, match=message):
        checked(tmp_path, *deepspeed_file(tmp_path, **content))
    unset_hf_deepspeed_config()  # from_pretrained of the tests to come would shard their models


def test_unknown_deepspeed_optimizers_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    content = {"optimizer": {"type": "Foo", "params": {}}, "zero_optimization": {"stage": 2}, **AUTO}
    with pytest.raises(UserError, match="DeepSpeed has no optimizer 'Foo'"):
        checked(tmp_path, *deepspeed_file(tmp_path, **content))
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_is_rejected(tmp_path, monkeypatch, stage):
    """ZeRO computes and clips the norm of its orthogonal updates, not that of the gradients."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    content = {"optimizer": {"type": "Muon", "params": {"lr": "auto"}}, "zero_optimization": zero, **AUTO}
    with pytest.raises(UserError, match="grad_norm would be that of the updates and --max_grad_norm would"):
        checked(tmp_path, *deepspeed_file(tmp_path, **content))
    unset_hf_deepspeed_config()


@pytest.mark.parametrize(("kind", "is_tested"), [("SGD", False), ("Lamb", False), ("Adagrad", True)])
def test_optimizers_that_zero_does_not_support_are_rejected(tmp_path, monkeypatch, kind, is_tested):
    """DeepSpeed refuses them after the model is loaded."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    content = {
        "optimizer": {"type": kind, "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 2}, "gradient_clipping": "auto", **AUTO,
    }  # fmt: skip
    if is_tested:
        checked(tmp_path, *deepspeed_file(tmp_path, **content))
    else:
        with pytest.raises(UserError, match=f"has not tested the optimizer '{kind}' under ZeRO; use AdamW"):
            checked(tmp_path, *deepspeed_file(tmp_path, **content))
        checked(tmp_path, *deepspeed_file(tmp_path, **content, zero_allow_untested_optimizer=True))
    unset_hf_deepspeed_config()


@pytest.fixture
def operators(tmp_path, monkeypatch):
    """Check the operators of a DeepSpeed file on the CPU."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)

    def check(*flags: str, offload: str | None = None, kind: str | None = None, **content) -> None:
        zero = {"stage": 2} | ({"offload_optimizer": {"device": offload}} if offload else {})
        if kind:
            content["optimizer"] = {"type": kind, "params": content.pop("params", {"lr": "auto"})}
        file = deepspeed_file(tmp_path, zero_optimization=zero, **content, **AUTO)
        check_operators(checked(tmp_path, *file, *flags).training)

    yield check
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("kind", ["Lion", "Lamb"])
def test_optimizers_that_deepspeed_lacks_on_the_device_are_rejected(operators, kind):
    """DeepSpeed raises after the model is loaded."""
    with pytest.raises(UserError) as raised:
        operators(kind=kind, zero_allow_untested_optimizer=True)
    assert str(raised.value).endswith(
        f"ds.json: the optimizer '{kind}' needs Fused{kind}, which DeepSpeed does not have for the device "
        "cpu; use AdamW"
    )


@pytest.mark.parametrize(
    ("options", "operator"),
    [
        ({"kind": "AdamW"}, "FusedAdam"),
        ({"kind": "AdamW", "offload": "cpu"}, "CPUAdam"),
        ({"kind": "Lion", "offload": "cpu"}, "CPULion"),
        ({"kind": "Adagrad", "offload": "cpu"}, "CPUAdagrad"),
        ({"offload": "cpu"}, "CPUAdam"),
        ({"kind": "Adagrad"}, None),
        ({"kind": "AdamW", "params": {"lr": "auto", "torch_adam": True}}, None),
        ({}, None),
    ],
)
def test_an_optimizer_that_cannot_be_compiled_is_rejected(operators, monkeypatch, options, operator):
    operators(**options)
    monkeypatch.setenv("CXX", "no-such-compiler")
    if operator is None:
        operators(**options)
        return
    with pytest.raises(UserError, match=rf"needs {operator}, .* lacks a C\+\+ compiler \(no-such-"):
        operators(**options)


def test_an_optimizer_that_needs_a_package_is_rejected(operators):
    with pytest.raises(UserError, match="the optimizer 'MuAdam' needs the package mup; install it"):
        operators(kind="MuAdam", zero_allow_untested_optimizer=True)


def test_another_optimizer_is_not_replaced_when_it_is_offloaded(operators):
    """accelerate would train with Adam, whatever --optim says."""
    with pytest.raises(UserError, match="--optim sgd: .* offloads the optimizer, and accelerate would"):
        operators("--optim", "sgd", offload="cpu")


def test_invalid_json_is_rejected(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        checked(tmp_path, "--deepspeed", str(tmp_path / "ds.json"))


@pytest.mark.parametrize("name", ["zero3", "zero3.json"])
def test_a_shipped_configuration_is_selected_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_deepspeed(name) == str(ROOT / "ds_config/zero3.json")
    assert read_deepspeed(find_deepspeed(name))["zero_optimization"]["stage"] == 3
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}')
    assert find_deepspeed(name) == name  # a file in the working folder has precedence
    assert read_deepspeed(name)["zero_optimization"]["stage"] == 1


def test_a_wrong_configuration_name_is_reported_with_the_right_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        parse_arguments(words(tmp_path, "--deepspeed", "zero4"))
    assert str(error.value) == (
        "--deepspeed zero4: no such file, and not the name of a shipped configuration "
        "(zero1, zero2, zero3, zero3_offload)"
    )


def test_the_run_records_the_name_of_a_shipped_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dft.arguments.training.is_launched", lambda: True)
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    arguments = parse_arguments(words(tmp_path, "--deepspeed", "zero2"))
    assert arguments.training.deepspeed == str(ROOT / "ds_config/zero2.json")
    assert arguments.flags["deepspeed"] == "zero2"
    unset_hf_deepspeed_config()
