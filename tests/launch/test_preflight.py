"""A preflight through the command line: the same on one process and on two, and no run is touched."""

import json

import pytest

from tests.launching import ROOT, launch


@pytest.fixture(scope="module")
def alone(example):
    """In the folder of a finished run, in one process."""
    output = example.folder / "preflight-alone"
    (output / "checkpoint-5").mkdir(parents=True)
    (output / "data_report.json").write_text("of the run")
    finished = launch(words(example, output), folder=example.folder)
    assert finished.code == 0, finished.output
    return output, finished.output


def words(example, output, **flags):
    return example.words(
        output, data_files=[example.train, example.other], eval_data_files=None, preflight=True,
        preflight_samples=50, **flags,
    )  # fmt: skip


def numbers(output):
    return json.loads((output / "preflight.json").read_text())


def test_a_random_model_is_told_to_begin_with_sft(alone):
    output, printed = alone
    report = numbers(output)
    assert set(report["files"]) == {"train.jsonl", "other.json"}
    assert report["whole"]["tokens"] == sum(one["tokens"] for one in report["files"].values())
    assert report["whole"]["avg_p_correct"] < 0.1
    assert report["advice"][0]["recommendation"].startswith("SFT first")
    assert "advice      SFT first" in printed and "step" not in printed.split("preflight   ")[1]


def test_what_lay_in_the_folder_is_as_it_was(alone):
    output, _ = alone
    assert sorted(one.name for one in output.iterdir()) == [
        "checkpoint-5", "data_report.json", "preflight.html", "preflight.json",
    ]  # fmt: skip
    assert (output / "data_report.json").read_text() == "of the run"


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_find_the_same(example, alone, stage):
    """DeepSpeed scores under ZeRO-3; under ZeRO-1 the ranks do without it."""
    output = example.folder / f"preflight-zero{stage}"
    flags = {"deepspeed": ROOT / f"ds_config/zero{stage}.json", "per_device_eval_batch_size": 3}
    finished = launch(words(example, output, **flags), folder=example.folder, launcher="deepspeed")
    assert finished.code == 0, finished.output
    found, expected = numbers(output), numbers(alone[0])
    for name, one in expected["files"].items():
        for metric in ("tokens", "avg_p_correct", "nll", "entropy", "gradient_kept", "p_end_of_turn"):
            assert found["files"][name][metric] == pytest.approx(one[metric], rel=1e-5), (name, metric)
        assert found["files"][name]["p_histogram"] == one["p_histogram"]
