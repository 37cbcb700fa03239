"""Relative differences between runs over their common steps."""

import json

import pytest

from dft.errors import UserError
from scripts.compare_runs import METRICS, largest_differences


def save(folder, values: dict[int, float]):
    folder.mkdir()
    history = [{"step": step, **dict.fromkeys(METRICS, value)} for step, value in values.items()]
    history.append({"step": 1, "eval_nll": 9.0})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_the_largest_relative_difference_is_returned(tmp_path):
    reference = save(tmp_path / "a", {1: 2.0, 2: 4.0, 3: 1.0})
    other = save(tmp_path / "b", {1: 2.1, 2: 4.1, 9: 50.0})
    assert largest_differences(reference, other) == pytest.approx(dict.fromkeys(METRICS, 0.05))


def test_runs_without_a_common_step_are_rejected(tmp_path):
    with pytest.raises(UserError, match="b: has no logged step in common with .*a$"):
        largest_differences(save(tmp_path / "a", {1: 2.0}), save(tmp_path / "b", {2: 2.0}))
