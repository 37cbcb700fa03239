"""The models that --preflight True loads."""

import pytest

from dft.arguments.conflicts import check_arguments
from dft.fine_tune import prepare_data
from dft.loss.objectives import Dft, Sft
from dft.training import run
from tests.training.base_scores.scoring_helpers import arguments_of, write_rows


@pytest.mark.parametrize(
    ("flags", "objective"),
    [(["asft", "--dft_alpha", "0.8", "--dft_alpha_schedule", "linear"], Dft(0.8)), (["psft"], Sft())],
)
def test_a_preflight_loads_no_base_model(tiny, tmp_path, monkeypatch, flags, objective):
    """It ranks all objectives, and none of them compares with an earlier model before the first step."""
    data = write_rows(tmp_path / "rows.jsonl", 4)
    words = ["--preflight", "True", "--base_scores", "False", "--objective"]
    preflight = arguments_of(tiny, data, tmp_path, *words, *flags)
    check_arguments(preflight)
    assert run.trained_objective(preflight) == objective

    def refuse(*_):
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(run, "load_base_model", refuse)
    tokenizer, encoder = run.load_encoder(preflight)
    model, base_model = run.load_models(preflight, tokenizer, prepare_data(preflight, encoder))
    assert model is not None and base_model is None
    training = arguments_of(tiny, data, tmp_path, "--objective", *flags)
    assert run.trained_objective(training).name == flags[0]
