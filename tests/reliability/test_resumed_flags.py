"""Changed flags take effect in a resumed run under every form of parallelism, with the same result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ROOT, train_records
from tests.reliability.selecting import mostly_slow

KINDS = {
    "single": (1, {}),
    "ddp": (2, {}),
    "zero1": (2, {"deepspeed": ROOT / "ds_config/zero1.json"}),
    "zero2": (2, {"deepspeed": ROOT / "ds_config/zero2.json"}),
    "zero3": (2, {"deepspeed": ROOT / "ds_config/zero3.json"}),
    "fsdp": (2, {"fsdp": True}),
    "zero3 on one rank": (1, {"deepspeed": ROOT / "ds_config/zero3.json", "per_device_train_batch_size": 4}),
}
"""Ranks and flags of each form of parallelism."""
BEFORE: dict[str, object] = {"learning_rate": 2e-3, "weight_decay": 0.0, "warmup_steps": 1, "max_steps": 4}
CHANGED: dict[str, object] = {
    "learning_rate": 5e-4, "weight_decay": 0.5, "adam_beta1": 0.5, "lr_scheduler_type": "constant",
    "max_steps": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def train(example, forks, tmp_path_factory):
    """Train without dropout, whose random numbers differ between the forms of parallelism."""
    model = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(example.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))

    def run(
        output: Path, kind: str, code: int = 0, env: dict[str, str] | None = None, **flags: object
    ) -> str:
        ranks, more = KINDS[kind]
        words = example.words(
            output,
            **{
                "model_name_or_path": model, "per_device_train_batch_size": 8 // ranks, "save_steps": 2,
                "save_strategy": "steps", "eval_data_files": None, "use_cpu": True, **BEFORE, **more, **flags,
            },
        )  # fmt: skip
        codes, printed = forks.run(words, ranks, **(env or {}))
        assert codes[0] == code, printed
        return printed

    return run


@pytest.fixture(scope="module")
def expected(train, tmp_path_factory) -> Path:
    """The output of a resumed run in one process; test_resumed_settings.py checks its numbers."""
    return changed_run(train, tmp_path_factory.mktemp("expected"), "single")[0]


def changed_run(train, folder: Path, kind: str) -> tuple[Path, str]:
    train(folder / "before", kind)
    printed = train(folder / "after", kind, resume_from_checkpoint=folder / "before/checkpoint-2", **CHANGED)
    return folder / "after", printed


SHARED = [kind for kind, (ranks, _) in KINDS.items() if ranks > 1]


@pytest.mark.parametrize("kind", mostly_slow(SHARED, ["zero3", "fsdp"]))
def test_changed_flags_have_the_same_effect_under_every_parallelism(train, expected, kind, tmp_path):
    output, printed = changed_run(train, tmp_path, kind)
    assert "note        --learning_rate: from 0.002 to 0.0005, from step 3 on" in printed
    assert "note        --weight_decay: from 0 to 0.5, from step 3 on" in printed
    rates = [record["learning_rate"] for record in train_records(output)]
    assert rates == pytest.approx([0.0, 2e-3, *[5e-4] * 4])
    weights, reference = load_file(output / "model.safetensors"), load_file(expected / "model.safetensors")
    unchanged = load_file(tmp_path / "before/model.safetensors")
    for name, weight in reference.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)
        assert not torch.allclose(weights[name], unchanged[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
def test_changed_flags_have_the_same_effect_on_another_number_of_ranks(train, expected, tmp_path):
    """The checkpoint is converted, which loses the options of parameter groups."""
    train(tmp_path / "before", "zero3")
    resume = {"resume_from_checkpoint": tmp_path / "before/checkpoint-2", "gradient_accumulation_steps": 2}
    printed = train(tmp_path / "after", "zero3 on one rank", **resume, **CHANGED)
    assert "note        --gradient_accumulation_steps: from 1 to 2, from step 3 on" in printed
    weights = load_file(tmp_path / "after/model.safetensors")
    for name, weight in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)


ACCELERATE = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true", "ACCELERATE_MIXED_PRECISION": "no",
}  # fmt: skip
"""The environment of `accelerate launch` with a configuration for ZeRO-3."""


def test_a_checkpoint_of_accelerate_launch_is_resumed_by_the_parallelism_that_it_has(train, tmp_path):
    """accelerate's own configuration runs ZeRO-3, although the command line names no DeepSpeed file."""
    printed = train(tmp_path / "whole", "ddp", env=ACCELERATE)
    assert "note        set by the configuration of accelerate launch: --deepspeed (ZeRO-3)" in printed
    assert "2 x cpu, DeepSpeed ZeRO-3, computes in" in printed
    resume = {"resume_from_checkpoint": tmp_path / "whole/checkpoint-2"}
    printed = train(tmp_path / "ddp", "ddp", code=2, **resume)
    assert "saved under DeepSpeed ZeRO-3, and this run is DDP; resume as it was saved" in printed
    train(tmp_path / "zero3", "zero3", **resume)
    expected = load_file(tmp_path / "whole/model.safetensors")
    for name, weight in load_file(tmp_path / "zero3/model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_an_optimizer_in_the_deepspeed_file_logs_the_learning_rate_of_the_step(train, tmp_path):
    """DeepSpeed advances the schedule within the step, before it is logged."""
    config = json.loads((ROOT / "ds_config/zero3.json").read_text())
    params = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "torch_adam": True}
    file = tmp_path / "with_optimizer.json"
    file.write_text(json.dumps({**config, "optimizer": {"type": "AdamW", "params": params}}))
    printed = train(tmp_path / "before", "ddp", deepspeed=file)
    rates = [record["learning_rate"] for record in train_records(tmp_path / "before")]
    assert rates == pytest.approx([0.0, 2e-3, 4e-3 / 3, 2e-3 / 3])
    resume = {"deepspeed": file, "resume_from_checkpoint": tmp_path / "before/checkpoint-2"}
    printed = train(tmp_path / "after", "ddp", **resume, **CHANGED)
    assert "note        --adam_beta1: from 0.9 to 0.5, from step 3 on" in printed
    rates = [record["learning_rate"] for record in train_records(tmp_path / "after")]
    assert rates == pytest.approx([0.0, 2e-3, *[5e-4] * 4])


@pytest.mark.slow
def test_a_schedule_in_the_deepspeed_file_takes_new_settings(train, tmp_path):
    file = tmp_path / "with_schedule.json"

    def write(total: int) -> None:
        config = json.loads((ROOT / "ds_config/zero2.json").read_text())
        params: dict[str, object] = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto"}
        optimizer = {"type": "AdamW", "params": {**params, "torch_adam": True}}
        params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 2}
        params |= {"total_num_steps": total, "warmup_type": "linear"}
        schedule = {"type": "WarmupDecayLR", "params": params}
        file.write_text(json.dumps({**config, "optimizer": optimizer, "scheduler": schedule}))

    write(total=4)
    flags = {"deepspeed": file, "warmup_steps": 2}
    train(tmp_path / "before", "ddp", **flags)
    write(total=6)
    resume = {"resume_from_checkpoint": tmp_path / "before/checkpoint-2", "max_steps": 6}
    train(tmp_path / "after", "ddp", **flags, **resume, learning_rate=4e-3)
    train(tmp_path / "whole", "ddp", **flags, max_steps=6, learning_rate=4e-3)
    rates, whole = (
        [record["learning_rate"] for record in train_records(tmp_path / name)] for name in ("after", "whole")
    )
    assert rates[2:] == pytest.approx(whole[2:]) and len(set(rates)) > 3


@pytest.mark.parametrize("kind", mostly_slow(["zero2", "zero3"], ["zero3"]))
def test_another_precision_under_deepspeed_is_refused(train, tmp_path, kind):
    train(tmp_path / "before", kind)
    resume = {"resume_from_checkpoint": tmp_path / "before/checkpoint-2", "bf16": True}
    printed = train(tmp_path / "after", kind, code=2, **resume)
    assert (
        "saved with precision under DeepSpeed (--bf16, --fp16) float32, and this run has precision under "
        "DeepSpeed (--bf16, --fp16) bf16: DeepSpeed stores the optimizer of each precision differently; use "
        f"the former, or start a new run with --model_name_or_path {tmp_path}/before/checkpoint-2"
    ) in printed
    assert "Traceback" not in printed
