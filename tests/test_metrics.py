"""The table of metrics, and what the other modules derive from it."""

import pytest

from dft.loss.objectives import OBJECTIVES, make_objective
from dft.metrics import (
    BY_NAME,
    CONSOLE,
    CURVES,
    METRICS,
    QUALITY,
    SCALARS,
    Show,
    evaluation_prefixes,
    metrics_named,
    parse_name,
    selectable,
    selection,
    shown_in,
)
from dft.training.measuring.meter import SUMS, means_of


def test_each_metric_has_one_row_with_a_meaning():
    assert len(BY_NAME) == len(METRICS)
    assert len({metric.heading for metric in SCALARS}) == len(SCALARS)
    assert all(metric.meaning.endswith(".") for metric in METRICS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_mean_of_the_meter_is_in_the_table(name):
    means = means_of(dict.fromkeys(SUMS, 1.0), make_objective(name), has_auxiliary=True)
    assert means.keys() <= {metric.name for metric in QUALITY}


def test_places_show_scalar_metrics_in_the_order_of_the_table():
    assert [metric.name for metric in CURVES] == [
        "loss", "nll", "avg_p_correct", "acc", "grad_norm", "learning_rate",
    ]  # fmt: skip
    assert CONSOLE == (
        "loss", "nll", "avg_p_correct", "acc", "grad_norm", "learning_rate", "tokens_per_second",
        "seconds_left",
    )  # fmt: skip
    assert all(not metric.bins for place in Show for metric in shown_in(place))


def test_checkpoints_are_selected_by_metrics_with_a_direction():
    assert selectable() == ["loss", "nll", "avg_p_correct", "acc", "objective", "p_end_of_turn"]
    assert selection("acc") == "higher" and selection("nll") == selection("loss") == "lower"
    assert BY_NAME["loss"].better is None


@pytest.mark.parametrize("name", ["kl", "entropy", "effective_tokens", "unknown"])
def test_metrics_that_do_not_measure_quality_have_no_direction(name):
    assert selection(name) is None


def test_unknown_metrics_are_rejected_with_the_valid_names():
    assert [metric.name for metric in metrics_named(["acc", "loss"])] == ["acc", "loss"]
    with pytest.raises(ValueError, match=r"^unknown metric los, p_histogram; choose from loss, nll, avg_p"):
        metrics_named(["los", "acc", "p_histogram"])


@pytest.mark.parametrize(
    ("key", "name", "metric"),
    [("acc", "", "acc"), ("math_nll", "math", "nll"), ("a_b_aux_loss", "a_b", "aux_loss")],
)
def test_the_evaluation_set_of_a_metric_is_read_from_its_key(key, name, metric):
    assert parse_name(key) == (name, BY_NAME[metric])
    assert selection(key) == selection(metric)


def test_only_metrics_name_evaluation_sets():
    log = [{"eval_b_acc": 1, "eval_b_runtime": 2}, {"eval_a_nll": 1, "eval_a_f.jsonl/nll": 1}, {"loss": 1}]
    assert evaluation_prefixes(log) == ["eval_b_", "eval_a_"]
    assert evaluation_prefixes([{"eval_runtime": 1, "eval_aux_loss": 2}]) == ["eval_"]
