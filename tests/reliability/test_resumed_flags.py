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

    def run(output: Path, kind: str, **flags: object) -> str:
        ranks, more = KINDS[kind]
        words = example.words(
            output,
            **{
                "model_name_or_path": model, "per_device_train_batch_size": 8 // ranks, "save_steps": 2,
                "save_strategy": "steps", "eval_data_files": None, "use_cpu": True, **BEFORE, **more, **flags,
            },
        )  # fmt: skip
        codes, printed = forks.run(words, ranks)
        assert not any(codes), printed
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


@pytest.mark.parametrize("kind", mostly_slow([kind for kind in KINDS if kind != "single"], ["zero3", "fsdp"]))
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
