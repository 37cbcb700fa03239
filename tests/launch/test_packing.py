"""Packed command-line runs take the same steps as unpacked ones."""

import json

import pytest

from tests.combinations import proves
from tests.launching import ROOT, eval_records, launch, train_records

EPOCHS = 3
"""Each epoch is one step with all conversations, because packed rows cannot be split like unpacked ones."""
LENGTH = 96


def run(example, name, launcher, **flags):
    output = example.folder / f"packing-{name}"
    words = example.words(
        output, dft_alpha=0.7, num_train_epochs=EPOCHS, max_train_samples=60, eval_strategy="epoch",
        max_length=LENGTH, lr_scheduler_type="constant", **flags,
    )  # fmt: skip
    finished = launch(words, folder=example.folder, launcher=launcher)
    assert finished.code == 0, finished.output
    return output, train_records(output), eval_records(output), finished.output


@proves({"attn_implementation": "sdpa"})
@proves({"packing": True, "deepspeed": "zero3"}, 2)
def test_packed_rows_under_zero3_equal_unpacked_rows_in_one_process(example):
    _, train, evaluation, printed = run(
        example, "single", "python", per_device_train_batch_size=60, attn_implementation="sdpa"
    )
    assert "sdpa attention" in printed and "padded on the right" in printed
    spread = {
        "per_device_train_batch_size": 16, "per_device_eval_batch_size": 3, "packing": True,
        "deepspeed": ROOT / "ds_config/zero3.json",
    }  # fmt: skip
    output, packed, packed_evaluation, printed = run(example, "rows", "deepspeed", **spread)
    report = json.loads((output / "data_report.json").read_text())["train"]
    assert 2 < report["rows"] <= 32 and report["sequences"] == 60 and report["packing_density"] > 0.9
    assert f"in {report['rows']} rows of {LENGTH} tokens" in printed and "padding-free" in printed
    assert len(packed) == len(train) == EPOCHS
    for got, expected in [*zip(packed, train, strict=True), *zip(packed_evaluation, evaluation, strict=True)]:
        prefix = "eval_" if "eval_nll" in got else ""
        for metric in ("loss", "nll", "avg_p_correct", "objective"):
            assert got[prefix + metric] == pytest.approx(expected[prefix + metric], rel=1e-4)
        if not prefix:
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert packed[-1]["nll"] < 0.98 * packed[0]["nll"]
