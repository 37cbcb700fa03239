"""Packed command-line runs take the same steps as unpacked ones."""

import json

import pytest

from tests.combinations import proves
from tests.launching import ROOT, eval_records, train_records

EPOCHS = 3
"""Each epoch is one step with all conversations, because packed rows cannot be split like unpacked ones."""
LENGTH = 96
WHOLE = {"per_device_train_batch_size": 60, "attn_implementation": "sdpa"}
SPREAD = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 3, "packing": True}
CHECKPOINTED = {**SPREAD, "enable_gradient_checkpointing": True}
WAYS = {
    "zero3": {**SPREAD, "deepspeed": ROOT / "ds_config/zero3.json"},
    "zero2": {**CHECKPOINTED, "deepspeed": ROOT / "ds_config/zero2.json"},
    "ddp": CHECKPOINTED,
    "ddp-sdpa": {**SPREAD, "attn_implementation": "sdpa"},
    "fsdp2": {**CHECKPOINTED, "fsdp": True},
}


@pytest.fixture(scope="module")
def run(example, forks):
    """Train with some flags on a number of ranks."""

    def trained(name, ranks, flags):
        output = example.folder / f"packing-{name}"
        words = example.words(
            output, dft_alpha=0.7, num_train_epochs=EPOCHS, max_train_samples=60, eval_strategy="epoch",
            max_length=LENGTH, lr_scheduler_type="constant", use_cpu=True, **flags,
        )  # fmt: skip
        codes, printed = forks.run(words, ranks)
        assert not any(codes), printed
        return output, train_records(output), eval_records(output), printed

    return trained


@pytest.fixture(scope="module")
def whole(run):
    """The records of unpacked rows in one process."""
    _, train, evaluation, printed = run("single", 1, WHOLE)
    assert "sdpa attention" in printed and "padded on the right" in printed
    return train, evaluation


def marks_of(way):
    return [proves(WAYS[way], 2), *[pytest.mark.slow] * (way != "zero3")]


@proves(WHOLE)
@pytest.mark.parametrize("way", [pytest.param(way, marks=marks_of(way)) for way in WAYS])
def test_packed_rows_on_two_ranks_equal_unpacked_rows_in_one_process(run, whole, way):
    train, evaluation = whole
    output, packed, packed_evaluation, printed = run(way, 2, WAYS[way])
    report = json.loads((output / "data_report.json").read_text())["train"]
    assert 2 < report["rows"] <= 32 and report["sequences"] == 60 and report["packing_density"] > 0.9
    assert f"in {report['rows']} rows of {LENGTH} tokens" in printed
    assert ("padding-free" in printed) == ("attn_implementation" not in WAYS[way])
    assert len(packed) == len(train) == EPOCHS
    for got, expected in [*zip(packed, train, strict=True), *zip(packed_evaluation, evaluation, strict=True)]:
        prefix = "eval_" if "eval_nll" in got else ""
        for metric in ("loss", "nll", "avg_p_correct", "objective"):
            assert got[prefix + metric] == pytest.approx(expected[prefix + metric], rel=1e-4)
        if not prefix:
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert packed[-1]["nll"] < 0.98 * packed[0]["nll"]
