"""The picture of how objectives divide their gradients between tokens of low, middle and high p."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from dft.report.foretelling import BANDS
from dft.report.pages.figures import BLUE, ORANGE, SKY, styled

COLORS = {"low": ORANGE, "middle": SKY, "high": BLUE}
HATCHES = {"low": "", "middle": "///", "high": "..."}


def foretelling_figure(foretold: Mapping[str, Any]) -> Figure:
    """Return bars of the shares of each objective's gradient, in the order of the ranking.

    Args:
        foretold: the result of `foretell`.
    """
    low, high = foretold["bands"]["low"], foretold["bands"]["high"]
    at_least = "\N{GREATER-THAN OR EQUAL TO}"
    labels = {"low": f"p < {low:g}", "middle": f"{low:g} to {high:g}", "high": f"p {at_least} {high:g}"}
    # Objectives whose first step is that of another one would repeat its bar.
    ranking = {name: row for name, row in foretold["ranking"].items() if row["same_first_step_as"] is None}
    with styled():
        figure = Figure(figsize=(8.4, 0.9 + 0.27 * len(ranking)), layout="constrained")
        axes = figure.subplots()
        places = range(len(ranking))
        starts = [0.0] * len(ranking)
        for band in BANDS:
            shares = [100 * (row["shares"][band] or 0.0) for row in ranking.values()]
            axes.barh(
                places, shares, 0.7, left=starts, color=COLORS[band], hatch=HATCHES[band], edgecolor="white",
                linewidth=0.4, label=labels[band],
            )  # fmt: skip
            starts = [start + share for start, share in zip(starts, shares, strict=True)]
        axes.set_yticks(places, list(ranking))
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="share of the objective's own gradient, %")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    return figure
