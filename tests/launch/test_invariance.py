"""The same conversations give the same loss and gradient, however the command line cuts up a step."""

import pytest

from tests.launching import ROOT, eval_records, launch, train_records

STEPS = 5
WAYS = {
    "2x4": ("python", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "ddp": ("torchrun", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "zero1": ("deepspeed", {"per_device_train_batch_size": 4, "deepspeed": ROOT / "ds_config/zero1.json"}),
    "zero2": (
        "deepspeed",
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "deepspeed": ROOT / "ds_config/zero2.json",
        },
    ),
    "zero3": (
        "deepspeed",
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "deepspeed": ROOT / "ds_config/zero3.json",
        },
    ),
}


def run(example, name, launcher, flags):
    output = example.folder / f"invariance-{name}"
    words = example.words(
        output, dft_alpha=0.7, max_steps=STEPS, eval_strategy="steps", eval_steps=STEPS,
        per_device_eval_batch_size=5, lr_scheduler_type="constant", **flags,
    )  # fmt: skip
    finished = launch(words, folder=example.folder, launcher=launcher)
    assert finished.code == 0, finished.output
    return train_records(output), eval_records(output)


@pytest.fixture(scope="module")
def whole(example):
    """Batches of 8 in one process, no accumulation: what the others must equal."""
    return run(example, "8x1", "python", {"per_device_train_batch_size": 8})


@pytest.mark.parametrize("name", WAYS)
def test_a_step_is_the_same_however_it_is_cut_up(example, whole, name):
    train, evaluation = run(example, name, *WAYS[name])
    expected_train, expected_eval = whole
    assert len(train) == len(expected_train) == STEPS
    for step, (got, expected) in enumerate(zip(train, expected_train, strict=True), start=1):
        for metric in ("loss", "nll", "avg_p_correct", "objective", "grad_norm"):
            assert got[metric] == pytest.approx(expected[metric], rel=1e-4), f"{metric} at step {step}"
        assert got["acc"] == pytest.approx(expected["acc"], abs=0.02)  # a tie may fall to the other side
    for metric in ("eval_loss", "eval_nll", "eval_avg_p_correct", "eval_objective"):
        assert evaluation[-1][metric] == pytest.approx(expected_eval[-1][metric], rel=1e-4)


def test_the_run_learns_and_its_steps_differ(whole):
    """Guards the comparison above: equal constants would pass it."""
    train, _ = whole
    assert train[-1]["nll"] < 0.9 * train[0]["nll"]
    assert len({record["grad_norm"] for record in train}) == STEPS
