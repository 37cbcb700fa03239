"""Figures draw the logged values, including NaN, infinite and missing ones."""

import re

import matplotlib
import numpy as np
import pytest

from dft.metrics import GRAD_NORM, LEARNING_RATE, LOSS, NLL
from dft.report.pages.figures import (
    EVALUATION,
    TRAIN,
    Line,
    curve_figure,
    format_tick,
    histogram_figure,
    overview_figure,
    style_of_run,
)
from dft.report.pages.history import Histogram, Series, best_of, histograms, series
from dft.report.pages.images import inline_svg, write_png

NAN, INF = float("nan"), float("inf")


def series_of(*values: float, first: int = 1) -> Series:
    return Series(np.arange(first, first + len(values)), np.array(values))


@pytest.fixture(scope="module")
def curves():
    """A figure of a training curve with a gap and an evaluation curve."""
    lines = [
        Line("training", series_of(3.0, NAN, INF, 1.0), TRAIN),
        Line("evaluation", series_of(2.5, 1.5), EVALUATION),
    ]
    return curve_figure(NLL, lines)


def test_lines_have_gaps_at_nonfinite_values(curves):
    train, crosses, evaluation, no_crosses = curves.axes[0].lines
    assert train.get_xdata().tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(train.get_ydata(), [3.0, NAN, NAN, 1.0])
    assert evaluation.get_ydata().tolist() == [2.5, 1.5]
    assert crosses.get_xdata().tolist() == [2, 3] and crosses.get_marker() == "x"
    assert no_crosses.get_xdata().tolist() == []
    assert train.get_marker() == ".", "a point between two gaps would be invisible"


def test_training_and_evaluation_differ_without_color(curves):
    train, _, evaluation, _ = curves.axes[0].lines
    assert train.get_linestyle() != evaluation.get_linestyle()
    assert train.get_marker() != evaluation.get_marker()


def test_a_single_record_is_a_visible_point_at_its_step():
    axes = curve_figure(NLL, [Line("training", series_of(2.0, first=7), TRAIN)]).axes[0]
    assert axes.lines[0].get_marker() == "o" and axes.get_xticks().tolist() == [7]


def test_a_curve_without_finite_values_has_a_label():
    axes = curve_figure(NLL, [Line("training", series_of(NAN, NAN), TRAIN)]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["no finite value"]


@pytest.mark.parametrize(
    ("metric", "values", "scale"),
    [
        (GRAD_NORM, [1.0, 1.0, 500.0], "log"),
        (GRAD_NORM, [1.0, 1.0, 5.0], "linear"),
        (GRAD_NORM, [0.0, 1.0, 500.0], "linear"),
        (LOSS, [0.1, INF, 0.1, 90.0], "log"),
        (LEARNING_RATE, [1e-9, 1e-9, 1e-5], "linear"),
    ],
)
def test_a_spike_makes_the_scale_logarithmic(metric, values, scale):
    assert curve_figure(metric, [Line("", series_of(*values), TRAIN)]).axes[0].get_yscale() == scale


def test_long_series_are_averaged_over_finite_values():
    long = series_of(*([1.0, 3.0, NAN, 5.0] * 1000))
    shown = long.thinned(400)
    assert len(shown) == 400 and shown.steps[-1] == 4000
    assert np.isfinite(shown.values).all()
    assert shown.values.mean() == pytest.approx(3.0, rel=1e-2)
    assert series_of(NAN, NAN, 1.0, 3.0).thinned(2).values.tolist()[1] == 2.0
    assert np.isnan(series_of(NAN, NAN, 1.0, 3.0).thinned(2).values[0])


@pytest.fixture(scope="module")
def polarized():
    before, after = np.array([6, 2, 1, 1]), np.array([4, 0, 0, 16])
    return Histogram(0, before), Histogram(9, after)


def test_the_histogram_shows_the_shares_of_the_counts(polarized):
    axes = histogram_figure(*polarized).axes[0]
    filled, _, outline = axes.patches
    assert filled.get_data().values.tolist() == [0.2, 0, 0, 0.8]
    assert filled.get_data().edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert outline.get_data().values.tolist() == [0.6, 0.2, 0.1, 0.1]
    assert outline.get_linestyle() == "--", "distinguishable without color"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["before (step 0)", "after (step 9)"]
    assert axes.get_ylim()[0] < 0.1


def test_an_empty_histogram_and_a_single_one_are_drawn(polarized):
    assert len(histogram_figure(None, Histogram(3, np.zeros(20))).axes[0].patches) == 2
    axes = histogram_figure(None, polarized[1]).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 9"]


def test_the_first_and_the_last_histogram_are_compared():
    log = [{"step": step, "eval_p_histogram": [step, 1]} for step in (5, 6, 7)]
    assert [(histogram.step, histogram.counts.tolist()) for histogram in histograms(log)] == [
        (5, [5, 1]),
        (7, [7, 1]),
    ]
    assert [histogram.step for histogram in histograms(log[:1])] == [5]
    assert histograms([{"step": 1, "eval_nll": 1.0}, {"step": 1, "eval_p_histogram": []}]) == []
    assert Histogram(0, np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 6])).between(0.1, 1) == 7 / 8


def test_a_series_has_numbers_only_and_its_best_value_is_finite():
    log = [{"step": 1, "nll": NAN}, {"step": 2, "nll": 2.0}, {"step": 3, "acc": 1.0}, {"step": 4, "nll": 3}]
    values = series([*log, {"step": 5, "nll": None}, {"step": 6, "nll": "1"}], "nll")
    assert values.steps.tolist() == [1, 2, 4]
    assert np.isnan(values.first) and values.last == 3.0
    assert values.best(NLL) == (2.0, 2) and values.best(LOSS) is None
    assert series(log, "loss").first is None
    assert best_of([NAN, 2.0, None, 1.0, 1.0], NLL) == [False, False, False, True, True]
    assert best_of([NAN, 2.0], NLL) == [False, False], "a single finite value has nothing to compare with"


def test_svgs_have_unique_ids_and_no_external_resources(curves, polarized):
    first = inline_svg(curves, "one", 'nll "<1>"')
    again, other = inline_svg(curves, "one", 'nll "<1>"'), inline_svg(curves, "other", "nll")
    assert first == again, "the same figure gives the same bytes"
    histogram = inline_svg(histogram_figure(*polarized), "p", "p")
    ids = [match for svg in (first, other, histogram) for match in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 0
    for svg in (first, other, histogram):
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', svg))
        assert (
            "http" not in svg and "<style" not in svg and "<metadata" not in svg and "font-family" not in svg
        )
    assert "<title>nll &#34;&lt;1&gt;&#34;</title>" in first
    assert ">step</text>" in first, "text stays text"


def test_pictures_are_deterministic_and_written_atomically(curves, tmp_path):
    line = Line("training", series_of(1.0, 2.0), TRAIN)
    for name in ("a.png", "b.png"):
        figure = overview_figure("$x_1 运行 \\frac", {"nll": (NLL, [line])}, None)
        write_png(figure, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(OSError) as error:
        write_png(curves, tmp_path / "c.png")
    assert error.value.filename == str(tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_an_overview_without_panels_is_written(tmp_path):
    write_png(overview_figure("nothing", {}, None), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


def test_drawing_does_not_change_matplotlib_settings():
    with matplotlib.rc_context({"font.size": 33.0, "text.parse_math": True}):
        figure = curve_figure(NLL, [Line("", series_of(1.0, 2.0), TRAIN)])
        inline_svg(figure, "x", "x")
        assert matplotlib.rcParams["font.size"] == 33.0 and matplotlib.rcParams["text.parse_math"]
    assert figure.axes[0].xaxis.label.get_fontsize() == 9


def test_twenty_one_runs_have_distinct_styles():
    styles = [style_of_run(index) for index in range(21)]
    assert len({(style.color, style.dashes) for style in styles}) == 21
    assert len({(style.marker, style.dashes) for style in styles}) == 21, "also without color"
    assert len({style.sign for style in styles}) == 21
    assert style_of_run(21) == style_of_run(0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.30000000000000004, "0.3"), (1e-6, "1e-6"), (20000.0, "20,000"), (0.9125, "0.9125")],
)
def test_tick_labels_are_short(value, shown):
    assert format_tick(value) == shown
