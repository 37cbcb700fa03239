"""What came of scripts/study/study.py, as tables and pictures."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.study.study_task import COLUMNS, DATA, TASKS

ALPHAS = {"SFT": 0.0, "alpha 0.5": 0.5, "DFT": 1.0}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of Student's distribution, by seeds: 95 % within."""
BINS = 20
DIGEST = "Figures"
"""Keyword of the digest within a picture, by which a test finds one that is older than the figures."""


class Mean(NamedTuple):
    """Over seeds; half the 95 % interval by Student's distribution."""

    value: float
    half: float


def mean(values: Sequence[float]) -> Mean:
    spread = stdev(values) / math.sqrt(len(values)) * T_95[len(values)] if len(values) > 1 else math.nan
    return Mean(fmean(values), spread)


def accuracy(found: Mapping[str, Any], method: str, data: str, asked: str) -> Mean:
    return mean([one["right"][asked] for one in runs_of(found, method, data)])


def to_sft(found: Mapping[str, Any], method: str, data: str, asked: str) -> Mean:
    """The difference to SFT, seed by seed: a seed has the same data for all methods."""
    right = {
        name: {one["seed"]: one["right"][asked] for one in runs_of(found, name, data)}
        for name in (method, "SFT")
    }
    return mean([value - right["SFT"][seed] for seed, value in right[method].items()])


def digest_of(found: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def runs_of(found: Mapping[str, Any], method: str, data: str) -> list[Mapping[str, Any]]:
    return [one for one in found["runs"] if (one["method"], one["data"]) == (method, data)]


def title(asked: str) -> str:
    """`sums-three` as people say it."""
    task, count = asked.split("-")
    return f"{task} of {count}"


def tables(found: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    heads = [f"{data}: {title(asked)}" for data, asked in COLUMNS]
    lines = [f"| fine-tuned on: asked | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    base = [f"{found['base'][asked]:.1f}" for _, asked in COLUMNS]
    lines.append(f"| base | {' | '.join(base)} |")
    for method in ALPHAS:
        cells = [accuracy(found, method, data, asked) for data, asked in COLUMNS]
        lines.append(f"| {method} | {' | '.join(f'{one.value:.1f} ± {one.half:.1f}' for one in cells)} |")
    seeds, asked = found["size"]["seeds"], found["size"]["asked"]
    least = asked - max(found["left_out"].values())
    lines += [
        "",
        f"Percent right, mean of {seeds} seeds ± half of its 95 % interval. Of the {asked} problems those "
        f"that a model was not trained on, at least {least}.",
        "",
    ]
    lines += [f"| to SFT | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in [name for name in ALPHAS if name != "SFT"]:
        cells = [to_sft(found, method, data, asked) for data, asked in COLUMNS]
        lines.append(f"| {method} | {' | '.join(f'{one.value:+.1f} ± {one.half:.1f}' for one in cells)} |")
    lines += [
        "",
        "Points above SFT on the same data, mean of the seeds' differences ± half of its 95 % interval.",
        "",
    ]
    heads = "| fine-tuned on | | p < 0.05 | 0.05 to 0.95 | p >= 0.95 | learning rate |"
    lines += [heads, "|---|---|---|---|---|---|"]
    for data in DATA:
        for name, some in {"base": [found["before"][data]], **histograms_of(found, data)}.items():
            total = [sum(column) for column in zip(*some, strict=True)]
            shares = [100 * one / sum(total) for one in (total[0], sum(total[1:-1]), total[-1])]
            rate = f"{runs_of(found, name, data)[0]['rate']:g}" if name in ALPHAS else ""
            cells = " | ".join(f"{one:.2f} %" for one in shares)
            lines.append(f"| {data} | {name} | {cells} | {rate} |")
    lines += [
        "",
        "Share of the supervised tokens of held-out problems of three, by the p of the right token.",
        "",
    ]
    lines += ["| learning rate: task | " + " | ".join(ALPHAS) + " |", "|---" * (len(ALPHAS) + 1) + "|"]
    rates = found["size"]["rates"]
    for task, rate in ((one, rate) for one in TASKS for rate in rates[one]):
        cells = [
            one["accuracy"]
            for one in found["rates"]
            if one["rate"] == rate and DATA[one["data"]].task == task
        ]
        lines.append(f"| {rate:g}: {task} | {' | '.join(f'{one:.1f}' for one in cells)} |")
    return "\n".join([*lines, "", "Percent right on problems of three for choosing, one seed.", ""])


def histograms_of(found: Mapping[str, Any], data: str) -> dict[str, list[list[int]]]:
    """Of all seeds, by method."""
    return {method: [one["histogram"] for one in runs_of(found, method, data)] for method in ALPHAS}


COLORS = {"SFT": "#d55e00", "alpha 0.5": "#009e73", "DFT": "#0072b2", "base": "#8a8a8a"}


def accuracy_figure(found: Mapping[str, Any]) -> Figure:
    """Bars of the means over seeds with their intervals, each seed a dot, and the base model a line."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    widths = [len(one.asked) for one in DATA.values()]
    for axes, (data, one) in zip(
        figure.subplots(1, len(DATA), sharey=True, width_ratios=widths), DATA.items(), strict=True
    ):
        for number, method in enumerate(ALPHAS):
            cells = [accuracy(found, method, data, asked) for asked in one.asked]
            places = [place + 0.26 * (number - 1) for place in range(len(one.asked))]
            heights, halves_ = [cell.value for cell in cells], [cell.half for cell in cells]
            axes.bar(places, heights, 0.24, color=COLORS[method], label=method)
            axes.errorbar(places, heights, halves_, fmt="none", ecolor="#1c1c1c", capsize=3)
            for place, asked in zip(places, one.asked, strict=True):
                dots = [run["right"][asked] for run in runs_of(found, method, data)]
                axes.plot([place] * len(dots), dots, ".", color="#1c1c1c", markersize=3)
        for place, asked in enumerate(one.asked):
            label = "base" if place == 0 else None
            ends = (place - 0.42, place + 0.42)
            axes.hlines(found["base"][asked], *ends, color=COLORS["base"], linestyle="--", label=label)
        axes.set_xticks(range(len(one.asked)), [title(asked) for asked in one.asked], fontsize=8)
        axes.set_title(f"fine-tuned on: {data}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("answers right, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def histogram_figure(found: Mapping[str, Any]) -> Figure:
    """Of p before and after, as in Figure 2 of the paper."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    edges = [index / BINS for index in range(BINS + 1)]
    for axes, data in zip(figure.subplots(1, len(DATA), sharey=True), DATA, strict=True):
        for name, some in {"base": [found["before"][data]], **histograms_of(found, data)}.items():
            total = [sum(column) for column in zip(*some, strict=True)]
            shares = [one / sum(total) for one in total]
            axes.stairs(shares, edges, color=COLORS[name], label=name, linewidth=1.6)
        axes.set_yscale("log")
        axes.set_title(f"fine-tuned on: {data}", fontsize=10)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("p of the right token, held-out problems of three", fontsize=9)
    figure.axes[0].set_ylabel("share of tokens")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure
