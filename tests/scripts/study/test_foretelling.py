"""What the preflight foretold of the studies' data: the comparison with what they measured, and its page."""

import json

import pytest

from scripts.study import foretelling
from scripts.study.foretelling import LEARNED, NAMES, RESULTS, Pair, accuracies, pairs_of, tables
from scripts.study.study_results import Mean
from tests.launching import ROOT

FORETOLD = json.loads((ROOT / "docs/foretelling.json").read_text())


def results(right):
    """Return results of a study with the accuracy of each method and seed on short arithmetic."""
    return {
        "runs": [
            {"method": method, "data": "half known", "seed": seed, "right": {"short arithmetic": value}}
            for method, values in right.items()
            for seed, value in enumerate(values)
        ]
    }


def report(**scores):
    """Return a report of the preflight with the scores of methods."""
    rows = {NAMES.get(method, method): {"score": value} for method, value in scores.items()}
    return {"ranking": rows}


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    assert tables(FORETOLD) in (ROOT / "docs/objectives.md").read_text()


def test_every_data_set_of_both_studies_was_foretold():
    assert {name for reports in FORETOLD.values() for name in reports} == {*LEARNED}
    assert {*FORETOLD} == {*RESULTS}


@pytest.mark.parametrize(
    ("difference", "foretold", "outcome"),
    [
        (Mean(3, 2), 0.1, "hit"), (Mean(-3, 2), -0.1, "hit"), (Mean(3, 2), -0.1, "miss"),
        (Mean(3, 2), 0.0, "miss"), (Mean(2, 3), 0.1, "open"), (Mean(0, 0), 0.1, "open"),
    ],
)  # fmt: skip
def test_a_pair_is_decided_by_the_interval_of_its_difference(difference, foretold, outcome):
    assert Pair("half known", "SFT", "DFT", difference, foretold).outcome == outcome


def test_pairs_compare_seed_by_seed():
    """DFT is 10 points above SFT in every seed, although the seeds differ by more than that."""
    measured = results({"SFT": [10.0, 50.0, 90.0], "DFT": [20.0, 60.0, 100.0]})
    (pair,) = pairs_of({"half known": report(SFT=0.7, DFT=0.4)}, measured)
    assert pair.difference == Mean(10, 0) and pair.foretold == pytest.approx(-0.3)
    assert pair.outcome == "miss"
    assert accuracies(measured, "half known") == "DFT 60.0, SFT 50.0"


def test_objectives_are_compared_but_for_those_that_the_preflight_ranks_as_another(tmp_path, monkeypatch):
    """power wins by 30 points over DFT, which has the higher score; asft has DFT's score and is left out."""
    measured = results(
        {"SFT": [10.0, 12.0], "DFT": [40.0, 42.0], "power": [70.0, 72.0], "asft": [90.0, 92.0]}
    )
    (tmp_path / "results.json").write_text(json.dumps(measured))
    monkeypatch.setattr(foretelling, "OBJECTIVES_RESULTS", tmp_path / "results.json")
    foretold = report(SFT=0.1, DFT=0.4, power=0.3, asft=0.4)
    foretold["ranking"]["asft"]["same_first_step_as"] = "dft"
    foretold["try"] = [{"name": "dft"}, {"name": "power"}]
    table = "\n".join(foretelling.objectives_tables({"half known": foretold}))
    assert "| half known | 3 | 3 | 2 | dft 41.0 (2), power 71.0 (1) | power 71.0 |" in table
    assert table.endswith("| points |\n|---|---|---|---|\n| half known | DFT | power | 30.0 ± 0.0 |")
