"""Figures of metrics and histograms, drawn with the object interface of matplotlib, without global state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dft.metrics import Metric
from dft.report.pages.history import Histogram, Series

BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000",
)  # fmt: skip
"""Colors that people with color vision deficiency can distinguish (Okabe and Ito)."""
PANEL = (4.2, 2.35)
"""Width and height of a panel in inches; they set the size of its text, as pages scale it to the column."""
MAX_POINTS = 400
"""Number of points of a line; a longer series is averaged over consecutive records."""
MARKERS = 8
"""Number of markers on a line that has markers."""
TICK_STEPS = (1, 2, 2.5, 5, 10)
"""Allowed distances between ticks, times a power of ten."""
SPIKE = 30
"""A metric is drawn on a logarithmic scale if its maximum exceeds its median by this factor."""
# fmt: off
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dft", "text.parse_math": False, "font.family": "DejaVu Sans",
    "font.size": 9, "axes.edgecolor": "#888888", "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "xtick.color": "#888888", "ytick.color": "#888888", "xtick.labelcolor": "#444444",
    "ytick.labelcolor": "#444444", "axes.labelcolor": "#444444", "lines.linewidth": 1.5,
    "lines.markersize": 4.5, "legend.frameon": False, "legend.fontsize": 8.5, "hatch.linewidth": 0.6,
}
# fmt: on


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save figures with `STYLE`, regardless of the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@dataclass(frozen=True)
class LineStyle:
    """Appearance of a line. Lines can be distinguished even without color.

    Attributes:
        color: matplotlib color.
        dashes: linestyle of matplotlib.
        marker: marker of matplotlib; "" for none.
        sign: a character that looks like the marker, for a legend in HTML.
    """

    color: str
    dashes: str = "-"
    marker: str = ""
    sign: str = ""


TRAIN = LineStyle(BLUE)
EVALUATION = LineStyle(VERMILION, "--", "o", "●")


def style_of_evaluation(index: int) -> LineStyle:
    """Return the style of one of several evaluation sets."""
    if index == 0:
        return EVALUATION
    style = style_of_run(index + 1)  # the first is the color of training, the second that of `EVALUATION`
    return LineStyle(style.color, "--", style.marker, style.sign)


def style_of_run(index: int) -> LineStyle:
    """Return the style of one of several runs; styles repeat after 21 runs."""
    colors = (BLUE, VERMILION, GREEN, PURPLE, BLACK, ORANGE, SKY)
    markers = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
    cycle, position = divmod(index, len(colors))
    marker, sign = markers[position]
    return LineStyle(colors[position], ("-", "--", ":")[cycle % 3], marker, sign + ("", "╌", "┈")[cycle % 3])


@dataclass(frozen=True)
class Line:
    """A metric over the steps, with its label and style."""

    label: str
    series: Series
    style: LineStyle


def curve_figure(metric: Metric, lines: Sequence[Line]) -> Figure:
    """Return the figure of one metric."""
    with styled():
        figure = Figure(figsize=PANEL, layout="constrained")
        draw_curves(figure.subplots(), metric, lines)
    return figure


def histogram_figure(before: Histogram | None, after: Histogram, floor: float | None = None) -> Figure:
    """Return the shares of tokens by p, on a logarithmic scale.

    Args:
        before: drawn as an outline; None if there is no earlier evaluation.
        after: drawn as a filled area.
        floor: the lowest share that is shown. Default: `lowest_share` of both. Figures with equal floors have
            the same scale.
    """
    with styled():
        figure = Figure(figsize=(5.0, 2.5), layout="constrained")
        draw_histogram(figure.subplots(), before, after, floor)
    return figure


def overview_figure(
    title: str,
    panels: Mapping[str, tuple[Metric, Sequence[Line]]],
    histogram: tuple[Histogram | None, Histogram] | None,
) -> Figure:
    """Return one picture of all panels, four in a row, with the histogram as the last.

    Args:
        title: title of the picture.
        panels: metrics with their lines, by the heading of the panel.
        histogram: histograms of the first evaluation (None if there is only one) and the last.
    """
    rows = -(-(len(panels) + (histogram is not None)) // 4) or 1
    with styled():
        figure = Figure(figsize=(16, 0.9 + 3.1 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        places = figure.subplots(rows, 4, squeeze=False).flatten()
        for axes, (name, (metric, lines)) in zip(places, panels.items(), strict=False):
            draw_curves(axes, metric, lines)
            axes.set_title(name, loc="left", fontsize=10, weight="bold")
        unused = places[len(panels) :]
        if histogram is not None:
            draw_histogram(unused[0], *histogram)
            unused[0].set_title("share of tokens by p", loc="left", fontsize=10, weight="bold")
            unused = unused[1:]
        for axes in unused:
            axes.set_axis_off()
        handles = {line.label: _handle(line.style) for _, lines in panels.values() for line in lines}
        if handles:
            figure.legend(
                [*handles.values()], [*handles], loc="outside upper right", ncols=min(len(handles), 4)
            )
    return figure


def _handle(style: LineStyle) -> Line2D:
    return Line2D([], [], color=style.color, linestyle=style.dashes, marker=style.marker)


def draw_curves(axes: Axes, metric: Metric, lines: Sequence[Line]) -> None:
    """Draw the lines of a metric; NaN and infinite values are crosses at the bottom, at their steps."""
    for line in lines:
        style, shown = line.style, line.series.thinned(MAX_POINTS)
        # A single record, or one between two gaps, would be invisible without a marker.
        needs_marker = len(shown) == 1 or not shown.finite.all()
        axes.plot(
            shown.steps,
            np.where(shown.finite, shown.values, np.nan),
            color=style.color,
            linestyle=style.dashes,
            marker=style.marker or ("o" if len(shown) == 1 else "." if needs_marker else ""),
            markevery=None if needs_marker or len(shown) <= 3 * MARKERS else len(shown) // MARKERS,
            markeredgecolor="white" if style.marker else style.color,
            markeredgewidth=0.6,
        )
        nonfinite = line.series.steps[~line.series.finite]
        axes.plot(
            nonfinite,
            np.full(len(nonfinite), 0.03),
            transform=axes.get_xaxis_transform(),
            color=style.color,
            linestyle="",
            marker="x",
        )
    _set_scales(axes, metric, [line.series for line in lines])


def _set_scales(axes: Axes, metric: Metric, curves: Sequence[Series]) -> None:
    values = np.concatenate([curve.values[curve.finite] for curve in curves] or [np.zeros(0)])
    if metric.spikes and values.size and values.min() > 0 and values.max() > SPIKE * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title("logarithmic scale", loc="right", fontsize=8.5, color="#444444")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
    steps = {step for curve in curves for step in curve.steps.tolist()}
    if len(steps) == 1:
        axes.set_xticks([*steps])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", labelpad=1)
    if not values.size:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="#444444")


def draw_histogram(
    axes: Axes, before: Histogram | None, after: Histogram, floor: float | None = None
) -> None:
    """Draw the last evaluation as a filled area and the first one as a dashed outline."""
    floor = floor or lowest_share([after] if before is None else [before, after])
    axes.set_yscale("log", nonpositive="clip")
    filled = axes.stairs(after.shares, after.edges, baseline=floor, fill=True, facecolor="#9ecae9")
    axes.stairs(after.shares, after.edges, baseline=floor, color=BLUE, linewidth=1)
    legend = {f"step {after.step:,}" if before is None else f"after (step {after.step:,})": filled}
    if before is not None:
        outline = axes.stairs(
            before.shares, before.edges, baseline=floor, color=VERMILION, linestyle="--", linewidth=1.6
        )
        legend = {f"before (step {before.step:,})": outline, **legend}
    axes.set_ylim(floor, 1)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
    axes.set_xlabel("p of the target token", labelpad=1)
    axes.set_ylabel("share of tokens")
    axes.legend([*legend.values()], [*legend], loc="upper center", ncols=2)


def lowest_share(histograms: Sequence[Histogram]) -> float:
    """Return the largest power of ten below all shares other than 0."""
    shares = np.concatenate([histogram.shares for histogram in histograms])
    positive = shares[shares > 0]
    return 10.0 ** np.floor(np.log10(positive.min() * 0.999)) if positive.size else 0.01


def format_tick(value: float, _: int | None = None) -> str:
    """Return the label of a tick, without trailing zeros or rounding errors."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.6g}".replace("e-0", "e-")
