"""Figures show what was logged, and survive what was logged wrongly."""

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
    histogram_figure,
    look_of,
    overview_figure,
    tick,
)
from dft.report.pages.history import Histogram, Series, best_of, histograms, series
from dft.report.pages.images import inline_svg, write_png

NAN, INF = float("nan"), float("inf")


def of(*values: float, first: int = 1) -> Series:
    return Series(np.arange(first, first + len(values)), np.array(values))


@pytest.fixture(scope="module")
def curves():
    """Training with a gap, and evaluation, as one figure."""
    lines = [Line("training", of(3.0, NAN, INF, 1.0), TRAIN), Line("evaluation", of(2.5, 1.5), EVALUATION)]
    return curve_figure(NLL, lines)


def test_lines_go_through_what_was_logged_and_stop_where_it_is_not_finite(curves):
    train, broken, evaluation, none = curves.axes[0].lines
    assert train.get_xdata().tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(train.get_ydata(), [3.0, NAN, NAN, 1.0])
    assert evaluation.get_ydata().tolist() == [2.5, 1.5]
    assert broken.get_xdata().tolist() == [2, 3] and broken.get_marker() == "x"
    assert none.get_xdata().tolist() == []
    assert train.get_marker() == ".", "a point between two gaps would be invisible"


def test_training_and_evaluation_differ_in_more_than_colour(curves):
    train, _, evaluation, _ = curves.axes[0].lines
    assert train.get_linestyle() != evaluation.get_linestyle()
    assert train.get_marker() != evaluation.get_marker()


def test_a_single_record_is_a_visible_point_at_its_step():
    axes = curve_figure(NLL, [Line("training", of(2.0, first=7), TRAIN)]).axes[0]
    assert axes.lines[0].get_marker() == "o" and axes.get_xticks().tolist() == [7]


def test_nothing_finite_is_said():
    axes = curve_figure(NLL, [Line("training", of(NAN, NAN), TRAIN)]).axes[0]
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
def test_a_spike_does_not_flatten_the_rest(metric, values, scale):
    assert curve_figure(metric, [Line("", of(*values), TRAIN)]).axes[0].get_yscale() == scale


def test_long_logs_are_drawn_as_means_of_what_is_finite():
    long = of(*([1.0, 3.0, NAN, 5.0] * 1000))
    shown = long.thinned(400)
    assert len(shown) == 400 and shown.steps[-1] == 4000
    assert np.isfinite(shown.values).all()
    assert shown.values.mean() == pytest.approx(3.0, rel=1e-2)
    assert of(NAN, NAN, 1.0, 3.0).thinned(2).values.tolist()[1] == 2.0
    assert np.isnan(of(NAN, NAN, 1.0, 3.0).thinned(2).values[0])


@pytest.fixture(scope="module")
def polarized():
    before, after = np.array([6, 2, 1, 1]), np.array([4, 0, 0, 16])
    return Histogram(0, before), Histogram(9, after)


def test_the_histogram_is_drawn_from_the_counts(polarized):
    axes = histogram_figure(*polarized).axes[0]
    filled, _, outline = axes.patches
    assert filled.get_data().values.tolist() == [0.2, 0, 0, 0.8]
    assert filled.get_data().edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert outline.get_data().values.tolist() == [0.6, 0.2, 0.1, 0.1]
    assert outline.get_linestyle() == "--", "told apart without colour"
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["before (step 0)", "after (step 9)"]
    assert axes.get_ylim()[0] < 0.1


def test_a_histogram_of_nothing_and_one_alone_are_drawn_too(polarized):
    assert len(histogram_figure(None, Histogram(3, np.zeros(20))).axes[0].patches) == 2
    axes = histogram_figure(None, polarized[1]).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 9"]


def test_the_first_and_the_newest_histogram_are_compared():
    log = [{"step": step, "eval_p_histogram": [step, 1]} for step in (5, 6, 7)]
    assert [(one.step, one.counts.tolist()) for one in histograms(log)] == [(5, [5, 1]), (7, [7, 1])]
    assert [one.step for one in histograms(log[:1])] == [5]
    assert histograms([{"step": 1, "eval_nll": 1.0}, {"step": 1, "eval_p_histogram": []}]) == []
    assert Histogram(0, np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 6])).between(0.1, 1) == 7 / 8


def test_a_series_has_only_numbers_and_its_best_is_finite():
    log = [{"step": 1, "nll": NAN}, {"step": 2, "nll": 2.0}, {"step": 3, "acc": 1.0}, {"step": 4, "nll": 3}]
    found = series([*log, {"step": 5, "nll": None}, {"step": 6, "nll": "1"}], "nll")
    assert found.steps.tolist() == [1, 2, 4]
    assert np.isnan(found.first) and found.last == 3.0
    assert found.best(NLL) == (2.0, 2) and found.best(LOSS) is None
    assert series(log, "loss").first is None
    assert best_of([NAN, 2.0, None, 1.0, 1.0], NLL) == [False, False, False, True, True]
    assert best_of([NAN, 2.0], NLL) == [False, False], "there is nothing to be better than"


def test_svgs_of_a_page_share_no_id_and_load_nothing(curves, polarized):
    one = inline_svg(curves, "one", 'nll "<1>"')
    again, other = inline_svg(curves, "one", 'nll "<1>"'), inline_svg(curves, "other", "nll")
    assert one == again, "the same figure gives the same bytes"
    histogram = inline_svg(histogram_figure(*polarized), "p", "p")
    ids = [found for svg in (one, other, histogram) for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 0
    for svg in (one, other, histogram):
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', svg))
        assert (
            "http" not in svg and "<style" not in svg and "<metadata" not in svg and "font-family" not in svg
        )
    assert "<title>nll &#34;&lt;1&gt;&#34;</title>" in one
    assert ">step</text>" in one, "text stays text"


def test_a_picture_of_any_name_is_written_as_a_whole_and_alike(curves, tmp_path):
    line = Line("training", of(1.0, 2.0), TRAIN)
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


def test_an_overview_of_nothing_is_a_picture_too(tmp_path):
    write_png(overview_figure("nothing", {}, None), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    with matplotlib.rc_context({"font.size": 33.0, "text.parse_math": True}):
        figure = curve_figure(NLL, [Line("", of(1.0, 2.0), TRAIN)])
        inline_svg(figure, "x", "x")
        assert matplotlib.rcParams["font.size"] == 33.0 and matplotlib.rcParams["text.parse_math"]
    assert figure.axes[0].xaxis.label.get_fontsize() == 9


def test_runs_look_different_up_to_twenty_one():
    looks = [look_of(place) for place in range(21)]
    assert len({(look.color, look.dashes) for look in looks}) == 21
    assert len({(look.marker, look.dashes) for look in looks}) == 21, "also without colour"
    assert len({look.sign for look in looks}) == 21
    assert look_of(21) == look_of(0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.30000000000000004, "0.3"), (1e-6, "1e-6"), (20000.0, "20,000"), (0.9125, "0.9125")],
)
def test_marks_on_an_axis_are_short(value, shown):
    assert tick(value) == shown
