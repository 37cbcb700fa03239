"""The comparison of all objectives: methods, learning rates, tables and picture, and a quick run."""

import json

import pytest
from PIL import Image

from dft.loss.objectives import OBJECTIVES
from scripts.study import objectives_results, objectives_study, study_results, study_runs, study_task
from scripts.study.objectives_study import OBJECTIVE_METHODS, RATES, rates_to_add
from scripts.study.study_runs import Run
from tests.launching import ROOT


def test_every_objective_is_compared_with_the_flags_that_it_needs():
    names = {str(flags[1]) for flags in OBJECTIVE_METHODS.values() if flags[0] == "--objective"}
    assert names | {"dft", "sft"} == set(OBJECTIVES)
    assert OBJECTIVE_METHODS["SFT"] == ("--dft_alpha", 0) and OBJECTIVE_METHODS["DFT"] == ("--dft_alpha", 1)
    scored = {name for name, flags in OBJECTIVE_METHODS.items() if "--base_scores" in flags}
    assert scored == {name for name, objective in OBJECTIVES.items() if objective.needs_base_logp}


def trials(*accuracies: tuple[float, float]) -> dict[Run, float]:
    return {Run("DFT", "right sums", -1, rate): accuracy for rate, accuracy in accuracies}


@pytest.mark.parametrize(
    ("accuracies", "added"),
    [
        ([(1e-4, 50.0), (3e-4, 60.0)], [1e-3]),
        ([(1e-4, 60.0), (3e-4, 50.0)], [3e-5]),
        ([(1e-4, 50.0), (3e-4, 60.0), (1e-3, 55.0)], []),
        ([(1e-4, 60.0), (3e-4, 60.0)], []),
        ([(1e-4, 0.0), (3e-4, 0.0), (1e-3, 0.0)], []),
        ([(RATES[0], 60.0), (RATES[1], 50.0)], []),
        ([(RATES[-1], 60.0), (RATES[-2], 50.0)], []),
    ],
    ids=[
        "best is highest",
        "best is lowest",
        "best is inside",
        "two alike",
        "none learns",
        "least",
        "largest",
    ],
)
def test_the_range_of_rates_grows_while_the_best_is_at_an_end(accuracies, added):
    assert rates_to_add(trials(*accuracies)) == [Run("DFT", "right sums", -1, rate) for rate in added]


def test_the_range_grows_for_each_method_and_data_set_separately():
    accuracies = {
        Run("SFT", "right sums", -1, 1e-4): 1.0, Run("SFT", "right sums", -1, 3e-4): 2.0,
        Run("DFT", "right sums", -1, 1e-4): 2.0, Run("DFT", "right sums", -1, 3e-4): 1.0,
        Run("DFT", "differences", -1, 1e-3): 2.0, Run("DFT", "differences", -1, 3e-3): 2.0,
    }  # fmt: skip
    assert rates_to_add(accuracies) == [
        Run("SFT", "right sums", -1, 1e-3),
        Run("DFT", "right sums", -1, 3e-5),
    ]


def test_the_best_rate_of_the_grown_range_is_chosen(monkeypatch):
    """Accuracy peaks at 1e-3, two steps above the range tried first; each step trains only what is new."""

    class Recorded:
        def select_rates(self):
            return trials((3e-5, 1.0), (1e-4, 2.0))

        def validate(self, runs, step):
            steps.append((step, [run.rate for run in runs]))
            return {run: {3e-4: 3.0, 1e-3: 4.0, 3e-3: 3.5}[run.rate] for run in runs}

    steps: list = []
    accuracies = objectives_study.select_rates(Recorded())
    assert steps == [("-1", [3e-4]), ("-2", [1e-3]), ("-3", [3e-3])]
    assert objectives_study.best_rates(accuracies) == {("DFT", "sums"): 1e-3}


def results_with(accuracies: dict[str, list[float]]) -> dict:
    """Return results in which each method has an accuracy per seed, half as high on problems of five."""
    runs = [
        {
            "method": method, "data": data, "seed": seed, "rate": 3e-4, "histogram": [1] * 20,
            "right": {asked: value if "three" in asked else value / 2 for asked in of_data.asked},
        }
        for method, values in accuracies.items() for data, of_data in study_task.DATA.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    rates = [
        {"method": method, "data": data, "seed": -1, "rate": rate, "accuracy": 51.0}
        for method in accuracies for data in ("right sums", "differences") for rate in (1e-3, 1e-4, 3e-4)
    ]  # fmt: skip
    asked = {asked for _, asked in study_task.COLUMNS}
    return {
        "size": objectives_study.QUICK_SIZE._asdict() | {"seeds": 3}, "runs": runs, "rates": rates,
        "base": dict.fromkeys(asked, 50.0), "left_out": dict.fromkeys(asked, 0),
        "at_other_rates": [
            {
                "method": "SFT", "data": study_task.WRONG, "seed": seed, "rate": 1e-3,
                "right": {"sums-three": 70.0 + seed, "sums-five": 35.0},
            }
            for seed in range(3)
        ],
    }  # fmt: skip


def test_tables():
    """power minus SFT: 8, 9, 10, mean 9 with half an interval of 4.303 / sqrt(3) = 2.5. DFT: -1, 0, 1."""
    results = results_with(
        {"SFT": [60.0, 62.0, 64.0], "DFT": [59.0, 62.0, 65.0], "power": [68.0, 71.0, 74.0]}
    )
    text = objectives_results.tables(results)
    assert "| power | 71.0 ± 7.5 |" in text and "| power | +9.0 ± 2.5 | +4.5 ± 1.2 |" in text
    assert "| power | 0.0001: 51.0, **0.0003: 51.0**, 0.001: 51.0 | 0.0001: 51.0, **0.0003: 51.0**," in text
    summary = objectives_results.summary_table(results)
    assert any(line.startswith("| power | right (+9.0), right, longer (+4.5), wrong") for line in summary)
    assert "| DFT | - | - | +12.0 | 62 % |" in summary
    figure = objectives_results.accuracy_figure(results)
    assert len(figure.axes) == len(study_task.COLUMNS)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["SFT", "DFT", "power"]


def test_methods_are_compared_with_sft_at_their_own_rate():
    """SFT has 60, 62, 64 at its rate of 3e-4, and 70, 71, 72 at that of power, which has 68, 71, 74."""
    results = results_with(
        {"SFT": [60.0, 62.0, 64.0], "DFT": [61.0, 63.0, 65.0], "power": [68.0, 71.0, 74.0]}
    )
    for run in results["runs"]:
        if run["method"] == "power":
            run["rate"] = 1e-3
    text = "\n".join(objectives_results.same_rate_table(results))
    assert "| SFT | 0.0003 | 62.0 ± 5.0 | 31.0 ± 2.5 |\n| SFT | 0.001 | 71.0 ± 2.5 | 35.0 ± 0.0 |" in text
    assert "| DFT to SFT | 0.0003 | +1.0 ± 0.0 | +0.5 ± 0.0 |" in text
    assert "| power to SFT | 0.001 | +0.0 ± 5.0 | +0.5 ± 3.7 |" in text


def test_the_page_and_the_picture_match_the_results():
    assert list(objectives_results.SHORT) == study_task.COLUMNS
    results = json.loads((ROOT / "docs/objectives_study.json").read_text())
    assert results["size"] == json.loads(json.dumps(objectives_study.ALL_SIZE._asdict()))
    assert study_results.methods_of(results) == list(OBJECTIVE_METHODS)
    text = (ROOT / "docs/objectives_study.md").read_text()
    for part in objectives_results.tables(results).strip().split("\n\n"):
        assert part in text
    assert (
        "\n".join(objectives_results.summary_table(results)).strip()
        in (ROOT / "docs/objectives.md").read_text()
    )
    with Image.open(ROOT / "docs/images/objectives_study.png") as picture:
        assert picture.text[study_results.DIGEST] == study_results.digest_of(results)


@pytest.mark.slow
def test_a_quick_study_of_three_objectives_runs(tmp_path, monkeypatch, capsys):
    """Started again in the same folder, it gives the same results."""
    study_runs.prepare()
    methods = {name: OBJECTIVE_METHODS[name] for name in ("SFT", "power", "psft")}
    monkeypatch.setattr(objectives_study, "OBJECTIVE_METHODS", methods)
    monkeypatch.setattr("sys.argv", ["objectives_study.py", str(tmp_path), "--quick"])
    objectives_study.main()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    results = json.loads((tmp_path / "objectives_study.json").read_text())
    assert len(results["runs"]) == 3 * len(study_task.DATA) * objectives_study.QUICK_SIZE.seeds
    rate = next(run["rate"] for run in results["runs"] if run["data"] == "right sums")
    # The first of the two steps has learning rate 0, so psft still equals SFT in the second.
    weights = [
        (tmp_path / f"runs/{name}-right_sums-0-{rate:g}/model.safetensors").read_bytes()
        for name in ("SFT", "power")
    ]
    assert weights[0] != weights[1], "the objective has an effect"
    assert any((tmp_path / "data/cache/base_scores").iterdir()), "psft compares with the base model"
    (tmp_path / "objectives_study.json").unlink()
    objectives_study.main()
    assert json.loads((tmp_path / "objectives_study.json").read_text()) == results
