"""Saved models that differ from the trained model are reported and do not replace earlier ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dft.errors import EXIT_USER_ERROR
from dft.training.checkpoints.folder import newest_checkpoint
from tests.launching import ROOT
from tests.reliability.selecting import mostly_slow


def words(example, output: Path, ranks: int = 1, **flags) -> list[str]:
    more = {"deepspeed": ROOT / "ds_config/zero3.json", "use_cpu": True} if ranks > 1 else {}
    settings = {
        "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 16,
        "resume_from_checkpoint": "auto", **more, **flags,
    }  # fmt: skip
    return example.words(output, **settings)


def check_refused(codes: list[int], printed: str, message: str) -> None:
    assert codes[0] == EXIT_USER_ERROR and all(codes), printed
    assert printed.count("error:") == 1 and message in printed and "Traceback" not in printed, printed


@pytest.mark.parametrize("ranks", mostly_slow([1, 2], [1]))
def test_a_damaged_checkpoint_is_not_published(example, forks, tmp_path, ranks):
    output = tmp_path / "run"
    env = {"DIE_AT": "verifying 4", "DIE_BY": "NAN", "DISK": str(output / "incomplete-checkpoint-4")}
    codes, printed = forks.run(words(example, output, ranks), ranks, **env)
    check_refused(codes, printed, "holds values that are not finite (NaN, infinity)")
    newest, passed_over = newest_checkpoint(output)
    assert newest.step == 2 and "incomplete-checkpoint-4" in passed_over[0]
    codes, printed = forks.run(words(example, output, ranks), ranks)
    assert not any(codes), printed


@pytest.mark.parametrize(
    ("verify", "ranks"),
    mostly_slow(
        [(policy, ranks) for policy in ("True", "False") for ranks in (1, 2)], [("True", 1), ("False", 1)]
    ),
)
def test_a_damaged_final_model_does_not_replace_an_earlier_one(example, forks, tmp_path, ranks, verify):
    output = tmp_path / "run"
    flags = {"save_strategy": "no", "resume_from_checkpoint": None}
    (code,), printed = forks.run(words(example, output, max_steps=1, **flags))
    assert code == 0, printed
    before = load_file(output / "model.safetensors")
    env = {"DIE_AT": "verifying 4", "DIE_BY": "NAN", "DISK": str(output / "incomplete-model")}
    command = words(example, output, ranks, verify_save=verify, **flags)
    codes, printed = forks.run(command, ranks, **env)
    after = load_file(output / "model.safetensors")
    if verify == "False":
        assert not any(codes), printed
        assert any(not weight.isfinite().all() for weight in after.values())
        return
    check_refused(
        codes, printed, f"it is in {output}/incomplete-model, and the files that {output} held before are"
    )
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_verification_does_not_change_the_run(example, forks, tmp_path, ranks):
    losses = []
    for verify in ("all", "False"):
        output = tmp_path / verify
        codes, printed = forks.run(words(example, output, ranks, verify_save=verify), ranks)
        assert not any(codes) and "not loaded" not in printed, printed
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        losses.append([(record["nll"], record["grad_norm"]) for record in history if "grad_norm" in record])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("all", "False"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
