"""--ema_decay under every form of parallelism, through the command line, and after a kill."""

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ROOT, eval_records, train_records

DECAY, STEPS = 0.8, 4


@pytest.fixture(scope="module")
def train(example, forks):
    """Train with 32 rows per step, and save and evaluate at every step."""

    def run(output, kind="single", env=None, **flags):
        ranks = 1 if kind == "single" else 2
        zero = {"deepspeed": ROOT / f"ds_config/{kind}.json"} if kind.startswith("zero") else {}
        zero |= {"fsdp": True} if kind == "fsdp" else {}
        settings = {"per_device_train_batch_size": 32 // ranks, "use_cpu": True, "ema_decay": DECAY}
        settings |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 32}
        settings |= {"resume_from_checkpoint": "auto", **zero, **flags}
        return forks.run(example.words(output, **settings), ranks, **(env or {}))

    return run


@pytest.fixture(scope="module")
def single(example, train):
    output = example.folder / "averaged-single"
    codes, printed = train(output)
    assert not any(codes), printed
    return output


def assert_averaged(base, output, file="model.safetensors") -> None:
    """Assert that the final model is the average of the base and the models of all checkpoints."""
    average = {name: weight.double() for name, weight in load_file(base / file).items()}
    for step in range(1, STEPS + 1):
        weights = load_file(output / f"checkpoint-{step}" / file)
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name].double() for name in average}
    final = load_file(output / file)
    for name, value in average.items():
        torch.testing.assert_close(final[name].double(), value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(weights[name], final[name]) for name in final)


@pytest.mark.parametrize(
    "kind",
    ["zero3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "zero1", "zero2", "fsdp"))],
)
def test_ranks_average_their_shards_and_train_as_one(example, train, single, tmp_path, kind):
    """Steps after an evaluation, in which the model has the average, use the trained weights again."""
    assert_averaged(example.model, single)
    output = tmp_path / kind
    codes, printed = train(output, kind)
    assert not any(codes), printed
    assert_averaged(example.model, output)
    for records in (train_records, eval_records):
        for record, expected in zip(records(output), records(single), strict=True):
            for name in ("loss", "grad_norm") if records is train_records else ("eval_loss", "eval_nll"):
                assert record[name] == pytest.approx(expected[name], rel=1e-3), name
    files = sorted(path.name for path in (output / "checkpoint-1").glob("weight_average*"))
    shards = [f"weight_average-{rank}-of-2.safetensors" for rank in (1, 2)]
    assert files == (["weight_average.safetensors"] if kind == "ddp" else shards)


@pytest.mark.slow  # tests/training/test_averaging.py resumes in one process
@pytest.mark.parametrize("kind", ["single", "zero2", "zero3", "fsdp"])
def test_a_killed_run_resumes_to_the_average_of_the_uninterrupted_run(train, single, tmp_path, kind):
    whole = single if kind == "single" else tmp_path / "whole"
    if kind != "single":
        codes, printed = train(whole, kind)
        assert not any(codes), printed
    output = tmp_path / "killed"
    codes, printed = train(output, kind, {"DIE_AT": "step 3"}, save_steps=2)
    assert any(codes) and (output / "checkpoint-2").is_dir(), printed
    codes, printed = train(output, kind)
    assert not any(codes) and "resumes from step 2" in printed, printed
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, whole))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "zero3"])
def test_averages_of_adapters_are_saved(example, train, tmp_path, kind):
    pytest.importorskip("peft")
    codes, printed = train(tmp_path, kind, lora_r=4)
    assert not any(codes), printed
    file = "adapter_model.safetensors"
    steps = [load_file(tmp_path / f"checkpoint-{step}" / file) for step in range(1, STEPS + 1)]
    final = load_file(tmp_path / file)
    for name in (name for name in final if "lora_B" in name):  # they begin with 0
        average = torch.zeros_like(final[name])
        for weights in steps:
            average = DECAY * average + (1 - DECAY) * weights[name]
        torch.testing.assert_close(final[name], average, rtol=1e-4, atol=1e-6)
