"""--freeze under every form of parallelism, through the command line."""

import pytest
import torch
from safetensors.torch import load_file

from dft.errors import EXIT_USER_ERROR
from tests.launching import ROOT, train_records

PATTERNS = ["model.layers.0.*", "model.embed_tokens.*"]


@pytest.fixture(scope="module")
def train(example, forks):
    """Train with 32 rows per step and frozen weights."""

    def run(output, kind="single", **flags):
        ranks = 1 if kind == "single" else 2
        zero = {"deepspeed": ROOT / f"ds_config/{kind}.json"} if kind.startswith("zero") else {}
        zero |= {"fsdp": True} if kind == "fsdp" else {}
        settings = {"per_device_train_batch_size": 32 // ranks, "use_cpu": True, "eval_data_files": None}
        settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "freeze": PATTERNS}
        return forks.run(example.words(output, **settings, **zero, **flags), ranks)

    return run


@pytest.fixture(scope="module")
def single(example, train):
    output = example.folder / "frozen-single"
    codes, printed = train(output)
    assert not any(codes), printed
    assert "note        --freeze model.layers.0.* model.embed_tokens.*: " in printed
    return output


@pytest.mark.parametrize(
    "kind", ["zero3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "zero2", "fsdp"))]
)
def test_sharding_changes_neither_the_steps_nor_which_weights_are_frozen(
    example, train, single, tmp_path, kind
):
    output = tmp_path / kind
    codes, printed = train(output, kind, enable_gradient_checkpointing=kind == "zero3")
    assert not any(codes), printed
    for record, expected in zip(train_records(output), train_records(single), strict=True):
        for name in ("loss", "grad_norm"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
    base, weights, expected = (
        load_file(folder / "model.safetensors") for folder in (example.model, output, single)
    )
    unchanged = {name for name, weight in weights.items() if torch.equal(weight, base[name])}
    assert unchanged == {name for name in base if name.startswith(("model.layers.0.", "model.embed_tokens."))}
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp"])
def test_a_resumed_run_freezes_the_same_weights(train, tmp_path, kind):
    output = tmp_path / kind
    codes, printed = train(output, kind)
    assert not any(codes), printed
    weights = load_file(output / "model.safetensors")
    codes, printed = train(output, kind, resume_from_checkpoint=output / "checkpoint-2")
    assert not any(codes) and "train step 1" not in printed, printed
    resumed = load_file(output / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.items())


def test_freezing_is_refused_beside_adapters(train, tmp_path):
    pytest.importorskip("peft")
    (code,), printed = train(tmp_path / "out", lora_r=4)
    assert code == EXIT_USER_ERROR and "Traceback" not in printed, printed
    assert (
        "--freeze model.layers.0.* model.embed_tokens.* has no effect with --lora_r 4, which trains adapters "
        "alone" in printed
    )
