"""The study's task is what it says, its figures are made of what was measured, and all of it runs."""

import json
import random
import re

import pytest

from scripts import study
from tests.launching import ROOT

LINE = re.compile(r"(\d+)\+(\d+)=(\d+)")


def worked(text: str) -> tuple[list[tuple[int, int, int]], int]:
    """The steps of a chain, and its answer."""
    *steps, last = text.splitlines()
    return [tuple(map(int, LINE.fullmatch(one).groups())) for one in steps], int(last.removeprefix("#### "))


def faults(row: dict) -> int:
    """Steps that are wrong by themselves; that the chain holds together is asserted."""
    question, answer = (turn["content"] for turn in row["messages"])
    numbers = list(map(int, question.split("+")))
    steps, result = worked(answer)
    assert [one[1] for one in steps] == numbers[1:] and steps[0][0] == numbers[0] and steps[-1][2] == result
    assert all(before[2] == after[0] for before, after in zip(steps, steps[1:], strict=False))
    wrong = sum(one + two != three for one, two, three in steps)
    assert (result == sum(numbers)) == (wrong == 0)
    return wrong


def test_chains_are_right_and_wrong_ones_wrong_in_one_step():
    generator = random.Random(0)
    assert not any(faults(study.conversation(generator, count)) for count in (2, 3, 5) for _ in range(200))
    wrong = [faults(study.conversation(generator, 3, wrong=0.3)) for _ in range(2000)]
    assert set(wrong) == {0, 1} and 0.25 < sum(wrong) / len(wrong) < 0.35
    assert study.chain([10, 20, 30], wrong_step=0, slip=1) == "10+20=31\n31+30=61\n#### 61"


def test_data_are_the_same_each_time_and_differ_between_seeds(tmp_path):
    size = study.QUICK
    for folder in ("one", "two"):
        study.write_data(tmp_path / folder, size)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files
    )
    tuning = [
        (tmp_path / "one" / study.tuning_file(data, seed)).read_text()
        for data in study.DATA
        for seed in (-1, 0, 1)
    ]
    assert len(set(tuning)) == len(tuning)
    asked = {name: (tmp_path / "one" / f"{name}.jsonl").read_text().splitlines() for name in study.SETS}
    for name, count in study.SETS.items():
        for row in map(json.loads, asked[name]):
            assert row["messages"][0]["content"].count("+") == count - 1 and not faults(row)
    longest = max(row.count("+") for text in tuning for row in text.splitlines())
    assert longest < min(row.count("+") for row in asked["five"]), "longer than fine-tuned on"


def found_with(accuracies: dict[str, list[float]]) -> dict:
    runs = [
        {"method": method, "data": data, "seed": seed, "rate": 1e-4, "three": value, "five": value / 2,
         "histogram": [1] + [0] * 18 + [3]}
        for method, values in accuracies.items() for data in study.DATA for seed, value in enumerate(values)
    ]  # fmt: skip
    base = {"three": 50.0, "five": 20.0, "histogram": [2] + [1] * 18 + [0]}
    rates = [{"method": method, "rate": 1e-4, "accuracy": 51.0} for method in study.ALPHAS]
    return {"size": study.QUICK._asdict(), "base": base, "runs": runs, "rates": rates}


def test_tables_and_intervals():
    """Of 60, 62, 64: mean 62, standard error 2 / sqrt(3), times 4.303."""
    found = found_with({"SFT": [60.0, 62.0, 64.0], "alpha 0.5": [1.0, 1.0, 1.0], "DFT": [70.0, 70.0, 73.0]})
    mean = study.accuracy(found, "SFT", "right", "three")
    assert mean.value == 62 and mean.half == pytest.approx(4.303 * 2 / 3**0.5)
    text = study.tables(found)
    assert "| SFT | 62.0 ± 5.0 | 31.0 ± 2.5 | 62.0 ± 5.0 | 31.0 ± 2.5 |" in text
    assert "| base | 50.0 | 20.0 | 50.0 | 20.0 |" in text
    assert (
        "| base | 10.00 % | 90.00 % | 0.00 % |" in text
        and "| DFT, right | 25.00 % | 0.00 % | 75.00 % |" in text
    )
    study.accuracy_figure(found), study.histogram_figure(found)


def test_the_documents_hold_what_was_measured():
    found = json.loads((ROOT / "docs/study.json").read_text())
    assert found["size"] == json.loads(json.dumps(study.FULL._asdict()))
    text = (ROOT / "docs/study.md").read_text()
    for part in study.tables(found).strip().split("\n\n"):
        assert part in text
    accuracies = study.tables(found).split("\n\n")[0]
    assert accuracies in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_all_of_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.py", str(tmp_path), "--quick"])
    study.main()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    found = json.loads((tmp_path / "study.json").read_text())
    assert len(found["runs"]) == len(study.ALPHAS) * len(study.DATA) * study.QUICK.seeds
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("accuracy.png", "histograms.png"))
