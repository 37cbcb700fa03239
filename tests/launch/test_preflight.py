"""--preflight True: identical results on one and two ranks, and existing files are untouched."""

import json

import pytest

from tests.launching import ROOT


@pytest.fixture(scope="module")
def alone(example, forks):
    """Run a preflight with one process in the folder of a finished run."""
    output = example.folder / "preflight-alone"
    (output / "checkpoint-5").mkdir(parents=True)
    (output / "data_report.json").write_text("of the run")
    codes, printed = forks.run(words(example, output))
    assert codes == [0], printed
    return output, printed


def words(example, output, **flags):
    return example.words(
        output, data_files=[example.train, example.other], eval_data_files=None, preflight=True,
        preflight_samples=50, **flags,
    )  # fmt: skip


def numbers(output):
    return json.loads((output / "preflight.json").read_text())


def test_sft_is_recommended_for_an_untrained_model(alone):
    output, printed = alone
    report = numbers(output)
    assert set(report["files"]) == {"train.jsonl", "other.json"}
    assert report["whole"]["tokens"] == sum(statistics["tokens"] for statistics in report["files"].values())
    assert report["whole"]["avg_p_correct"] < 0.1
    assert report["advice"][0]["recommendation"].startswith("SFT first")
    assert "advice      SFT first" in printed and "train step" not in printed


def test_existing_files_are_untouched(alone):
    output, _ = alone
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint-5", "data_report.json", "preflight.html", "preflight.json",
    ]  # fmt: skip
    assert (output / "data_report.json").read_text() == "of the run"


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_give_the_same_report(example, forks, alone, stage):
    """Under ZeRO-3 the DeepSpeed engine scores; under ZeRO-1 the ranks score without it."""
    output = example.folder / f"preflight-zero{stage}"
    flags = {"deepspeed": ROOT / f"ds_config/zero{stage}.json", "per_device_eval_batch_size": 3}
    codes, printed = forks.run(words(example, output, **flags), ranks=2)
    assert codes == [0, 0], printed
    assert printed.count("--preflight True ignores --deepspeed") == (stage == 1)
    actual, expected = numbers(output), numbers(alone[0])
    for name, file_statistics in expected["files"].items():
        for metric in ("tokens", "avg_p_correct", "nll", "entropy", "gradient_kept", "p_end_of_turn"):
            assert actual["files"][name][metric] == pytest.approx(file_statistics[metric], rel=1e-5), (
                name,
                metric,
            )
        assert actual["files"][name]["p_histogram"] == file_statistics["p_histogram"]
    compare_objectives(actual["objectives"], expected["objectives"], sharded=stage == 3)


def compare_objectives(actual, expected, sharded):
    """Ranking, shares and recommendations are equal; gradients are compared where a rank has whole ones."""
    assert actual["try"] == expected["try"] and actual["noise_probe"] == expected["noise_probe"]
    scores, reference = (
        {name: row["score"] for name, row in report["ranking"].items()} for report in (actual, expected)
    )
    assert scores == pytest.approx(reference, rel=1e-4)
    if sharded:
        reason = "DeepSpeed ZeRO-3 holds no whole gradient on any rank; a single process computes it"
        assert actual["first_step"] == {"not_computed": reason}
    else:
        rises, reference = (
            {name: rise for name, rise in report["first_step"]["rise"].items() if rise is not None}
            for report in (actual, expected)
        )
        assert len(rises) >= 12 and rises == pytest.approx(reference, rel=1e-3)
