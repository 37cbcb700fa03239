"""Figures of a run, drawn by matplotlib through its objects: there is no state outside of a figure."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dft.metrics import Metric
from dft.report.pages.history import Histogram, Series

BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000",
)  # fmt: skip
"""Told apart by all kinds of colour vision (Okabe and Ito)."""
PANEL = (4.2, 2.35)
"""Inches of a small figure. An SVG is as wide as its place on the page; this sets the size of its text."""
POINTS = 400
"""Records that a line shows; means over stretches of a longer log."""
MARKERS = 8
"""On a line that is told by its marker."""
ROUND = (1, 2, 2.5, 5, 10)
"""Distances of the marks on an axis, up to a power of ten."""
SPIKE = 30
"""A metric whose greatest value is this many times its median is drawn on a logarithmic scale."""
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
    """Figures are drawn and saved as `STYLE` has it, whatever matplotlibrc the user has."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@dataclass(frozen=True)
class Look:
    """How a line is told from others, with and without colour.

    Attributes:
        dashes: matplotlib's linestyle.
        marker: matplotlib's marker; "" for none.
        sign: the marker as a letter, for a legend in text.
    """

    color: str
    dashes: str = "-"
    marker: str = ""
    sign: str = ""


TRAIN = Look(BLUE)
EVALUATION = Look(VERMILION, "--", "o", "●")


def look_of(number: int) -> Look:
    """The look of one of several runs; the 22nd looks as the first."""
    colors = (BLUE, VERMILION, GREEN, PURPLE, BLACK, ORANGE, SKY)
    markers = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
    cycle, place = divmod(number, len(colors))
    marker, sign = markers[place]
    return Look(colors[place], ("-", "--", ":")[cycle % 3], marker, sign + ("", "╌", "┈")[cycle % 3])


@dataclass(frozen=True)
class Line:
    """A metric over the steps, and how it looks."""

    label: str
    series: Series
    look: Look


def curve_figure(metric: Metric, lines: Sequence[Line]) -> Figure:
    """One panel of a page."""
    with styled():
        figure = Figure(figsize=PANEL, layout="constrained")
        draw_curves(figure.subplots(), metric, lines)
    return figure


def histogram_figure(before: Histogram | None, after: Histogram, floor: float | None = None) -> Figure:
    """Shares of tokens by p, on a logarithmic scale.

    Args:
        before: None if there is nothing to compare with.
        floor: the lowest share that is shown, for several figures to have the same scale.
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
    """One picture with all panels, four in a row, and the histogram as the last.

    Args:
        panels: by their headings.
        histogram: at the first evaluation, if it is another, and at the newest.
    """
    rows = -(-(len(panels) + (histogram is not None)) // 4) or 1
    with styled():
        figure = Figure(figsize=(16, 0.9 + 3.1 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        places = figure.subplots(rows, 4, squeeze=False).flatten()
        for axes, (name, (metric, lines)) in zip(places, panels.items(), strict=False):
            draw_curves(axes, metric, lines)
            axes.set_title(name, loc="left", fontsize=10, weight="bold")
        rest = places[len(panels) :]
        if histogram is not None:
            draw_histogram(rest[0], *histogram)
            rest[0].set_title("share of tokens by p", loc="left", fontsize=10, weight="bold")
            rest = rest[1:]
        for axes in rest:
            axes.set_axis_off()
        handles = {line.label: _handle(line.look) for _, lines in panels.values() for line in lines}
        if handles:
            figure.legend(
                [*handles.values()], [*handles], loc="outside upper right", ncols=min(len(handles), 4)
            )
    return figure


def _handle(look: Look) -> Line2D:
    return Line2D([], [], color=look.color, linestyle=look.dashes, marker=look.marker)


def draw_curves(axes: Axes, metric: Metric, lines: Sequence[Line]) -> None:
    """The lines of a metric; what is not finite is a cross at the bottom, at its step."""
    for line in lines:
        look, shown = line.look, line.series.thinned(POINTS)
        # A line of one record, or beside a gap, would be invisible without a marker.
        alone = len(shown) == 1 or not shown.finite.all()
        axes.plot(
            shown.steps,
            np.where(shown.finite, shown.values, np.nan),
            color=look.color,
            linestyle=look.dashes,
            marker=look.marker or ("o" if len(shown) == 1 else "." if alone else ""),
            markevery=max(1, len(shown) // MARKERS) if len(shown) > 3 * MARKERS and not alone else None,
            markeredgecolor="white" if look.marker else look.color,
            markeredgewidth=0.6,
        )
        broken = line.series.steps[~line.series.finite]
        axes.plot(
            broken,
            np.full(len(broken), 0.03),
            transform=axes.get_xaxis_transform(),
            color=look.color,
            linestyle="",
            marker="x",
        )
    _scale(axes, metric, [line.series for line in lines])


def _scale(axes: Axes, metric: Metric, shown: Sequence[Series]) -> None:
    values = np.concatenate([one.values[one.finite] for one in shown] or [np.zeros(0)])
    if metric.spikes and values.size and values.min() > 0 and values.max() > SPIKE * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title("logarithmic scale", loc="right", fontsize=8.5, color="#444444")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    steps = {step for one in shown for step in one.steps.tolist()}
    if len(steps) == 1:
        axes.set_xticks([*steps])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", labelpad=1)
    if not values.size:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="#444444")


def draw_histogram(
    axes: Axes, before: Histogram | None, after: Histogram, floor: float | None = None
) -> None:
    """The newest evaluation filled, the first one as a dashed outline."""
    floor = floor or lowest_share([one for one in (before, after) if one is not None])
    axes.set_yscale("log", nonpositive="clip")
    filled = axes.stairs(after.shares, after.edges, baseline=floor, fill=True, facecolor="#9ecae9")
    axes.stairs(after.shares, after.edges, baseline=floor, color=BLUE, linewidth=1)
    legend = {f"step {after.step:,}" if before is None else f"after (step {after.step:,})": filled}
    if before is not None:
        look = {"color": VERMILION, "linestyle": "--", "linewidth": 1.6}
        outline = axes.stairs(before.shares, before.edges, baseline=floor, **look)
        legend = {f"before (step {before.step:,})": outline, **legend}
    axes.set_ylim(floor, 1)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
    axes.set_xlabel("p of the right token", labelpad=1)
    axes.set_ylabel("share of tokens")
    axes.legend([*legend.values()], [*legend], loc="upper center", ncols=2)


def lowest_share(shown: Sequence[Histogram]) -> float:
    """The power of ten below every share that is not 0."""
    shares = np.concatenate([one.shares for one in shown])
    positive = shares[shares > 0]
    return 10.0 ** np.floor(np.log10(positive.min() * 0.999)) if positive.size else 0.01


def tick(value: float, _: int | None = None) -> str:
    """A number on an axis, without digits that say nothing."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.6g}".replace("e-0", "e-")
