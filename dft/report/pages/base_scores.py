"""The section on p before against p after training: pictures, and the tokens that changed most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dft.report.pages.figures import VERMILION, styled
from dft.report.pages.images import inline_svg

UNCHANGED = 0.1
"""Change of p below which a token counts as unchanged in the caption."""


@dataclass(frozen=True)
class BaseScoresView:
    """What the page shows of a comparison.

    Attributes:
        split: name of the data, such as "eval".
        svg: the picture.
        caption: how to read it, with the shares of tokens that rose and fell.
        tables: title and examples of the tokens whose p rose most, and fell most.
    """

    split: str
    svg: Markup
    caption: str
    tables: list[tuple[str, list[dict[str, Any]]]]


def base_scores_views(comparisons: Sequence[dict[str, Any]] | None) -> list[BaseScoresView]:
    """Return what the page shows of each compared data set; nothing without a comparison.

    Args:
        comparisons: `base_scores` of the report.
    """
    compared = [comparison for comparison in comparisons or () if comparison["tokens"]]
    return [_view(comparison, f"base-scores-{number}") for number, comparison in enumerate(compared)]


def _view(comparison: dict[str, Any], name: str) -> BaseScoresView:
    counts = np.array(comparison["counts"])
    rose, fell = _moved(counts)
    caption = (
        f"{comparison['tokens']:,} supervised tokens of the {comparison['split']} data by their p before "
        f"training and at step {comparison['step']:,}. Tokens on the dashed line kept their p; those above "
        f"it became more likely ({100 * rose:.1f} % by more than {UNCHANGED:g}), those below it less likely "
        f"({100 * fell:.1f} %). "
        f"Mean p: {comparison['mean_before']:.3f} before, {comparison['mean_after']:.3f} after."
    )
    svg = inline_svg(comparison_figure(counts), name, caption)
    names = (("p rose most", "rises"), ("p fell most", "falls"))
    tables = [(title, comparison[key]) for title, key in names if comparison[key]]
    return BaseScoresView(comparison["split"], svg, caption, tables)


def _moved(counts: np.ndarray) -> tuple[float, float]:
    """Return the shares of tokens whose bin of p is higher, and lower, by more than `UNCHANGED`."""
    bins = np.arange(len(counts))
    steps = (bins[None, :] - bins[:, None]) / len(counts)  # (before, after)
    total = counts.sum()
    return counts[steps > UNCHANGED].sum() / total, counts[steps < -UNCHANGED].sum() / total


def comparison_figure(counts: np.ndarray) -> Figure:
    """Return a map of the number of tokens by p before (horizontal) and after (vertical).

    Args:
        counts: (bins, bins), first by p before.
    """
    with styled():
        figure = Figure(figsize=(5.0, 3.9), layout="constrained")
        axes = figure.subplots()
        edges = np.linspace(0, 1, len(counts) + 1)
        shown = np.ma.masked_equal(counts.T, 0)
        colors = LinearSegmentedColormap.from_list("tokens", ["#c6dbef", "#4292c6", "#08306b"], N=24)
        mesh = axes.pcolormesh(edges, edges, shown, norm=LogNorm(1, max(2, counts.max())), cmap=colors)
        axes.plot([0, 1], [0, 1], color=VERMILION, linestyle="--", linewidth=1)
        axes.set_aspect("equal")
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_xlabel("p before training", labelpad=1)
        axes.set_ylabel("p after training")
        bar = figure.colorbar(mesh, ax=axes, shrink=0.7, aspect=15)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_label("tokens")
    return figure


def visible(text: str) -> str:
    """Return a text with line breaks and spaces at its ends shown as characters."""
    shown = text.replace("\n", "↵")
    stripped = shown.strip(" ")
    start = len(shown) - len(shown.lstrip(" "))
    return "·" * start + stripped + "·" * (len(shown) - start - len(stripped))
