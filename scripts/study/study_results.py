"""The tables and pictures of the study."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))

from dft.report.pages.images import write_png
from scripts.study.study_task import COLUMNS, DATA, TASKS, WRONG

ALPHAS = {"SFT": 0.0, "alpha 0.5": 0.5, "DFT": 1.0}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's distribution for 95 % intervals, by the number of seeds."""
BINS = 20
DIGEST = "Figures"
"""PNG keyword of the digest of the results, used by a test to detect pictures older than study.json."""


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
        value: the mean.
        half: half of its 95 % interval by Student's distribution; NaN for a single seed.
    """

    value: float
    half: float


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of one value per seed."""
    spread = stdev(values) / math.sqrt(len(values)) * T_95[len(values)] if len(values) > 1 else math.nan
    return Mean(fmean(values), spread)


def accuracy(results: Mapping[str, Any], method: str, data: str, asked: str) -> Mean:
    """Return the accuracy of a method on a file of problems, in percent.

    Args:
        results: the content of study.json.
        method: name of the method.
        data: key of `DATA`, the data set to fine-tune on.
        asked: the file of problems.
    """
    return mean([run["right"][asked] for run in runs_of(results, method, data)])


def cell(value: Mean, sign: str = "", digits: int = 1) -> str:
    """Return a mean and half of its interval as text.

    Args:
        value: the mean.
        sign: "+" to show the sign of positive values as well.
        digits: digits after the point.
    """
    return f"{value.value:{sign}.{digits}f} ± {value.half:.{digits}f}"


def difference(results: Mapping[str, Any], first: str, second: str, data: str, asked: str) -> Mean:
    """Return the mean accuracy of a second method minus that of a first one with the same seed and data."""
    by_seed = {run["seed"]: run["right"][asked] for run in runs_of(results, first, data)}
    return mean([run["right"][asked] - by_seed[run["seed"]] for run in runs_of(results, second, data)])


def difference_to_sft(results: Mapping[str, Any], method: str, data: str, asked: str) -> Mean:
    """Return the mean difference to SFT with the same seed, that is, with the same data."""
    return difference(results, "SFT", method, data, asked)


def write_results(
    results: Mapping[str, Any], folder: Path, name: str, text: str, figures: Mapping[str, Figure]
) -> None:
    """Write results, their tables and pictures into a folder, and print the tables.

    Args:
        results: the content of the JSON file.
        folder: an existing folder.
        name: stem of the JSON file.
        text: the tables, for table.md.
        figures: the pictures, by the stems of their files.
    """
    (folder / f"{name}.json").write_text(json.dumps(results) + "\n")
    (folder / "table.md").write_text(text)
    digest = {DIGEST: digest_of(results)}
    for stem, figure in figures.items():
        write_png(figure, folder / f"{stem}.png", digest)
    print(text)


def digest_of(results: Mapping[str, Any]) -> str:
    """Return the digest that the pictures of these results store."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def runs_of(results: Mapping[str, Any], method: str, data: str) -> list[Mapping[str, Any]]:
    """Return the runs of all seeds with one method and data set."""
    return [run for run in results["runs"] if (run["method"], run["data"]) == (method, data)]


def by_rate(results: Mapping[str, Any], method: str, data: str) -> dict[float, dict[int, dict[str, float]]]:
    """Return the accuracies of a method on a data set, by learning rate, seed and file of problems.

    Besides the selected rate these are the rates that the study compares on partly wrong data.
    """
    scores: dict[float, dict[int, dict[str, float]]] = {}
    others = [run for run in results["at_other_rates"] if (run["method"], run["data"]) == (method, data)]
    for run in [*runs_of(results, method, data), *others]:
        scores.setdefault(run["rate"], {})[run["seed"]] = run["right"]
    return dict(sorted(scores.items()))


def methods_of(results: Mapping[str, Any]) -> list[str]:
    """Return the methods that were compared, in the order of their runs."""
    return list(dict.fromkeys(run["method"] for run in results["runs"]))


def title(asked: str) -> str:
    """Return the name of a file of problems as a title: `sums-three` is "sums of three"."""
    task, count = asked.split("-")
    return f"{task} of {count}"


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = (accuracy_table, difference_table, wrong_data_table, distribution_table, rate_table)
    return "\n".join(line for part in parts for line in part(results))


def header(first: str, columns: Sequence[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]


def problem_columns() -> list[str]:
    """Return the headings of the columns, one for each data set and file of problems."""
    return [f"{data}: {title(asked)}" for data, asked in COLUMNS]


def accuracy_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of accuracies."""
    lines = header("fine-tuned on: asked", problem_columns())
    base = [f"{results['base'][asked]:.1f}" for _, asked in COLUMNS]
    lines.append(f"| base | {' | '.join(base)} |")
    for method in methods_of(results):
        means = [accuracy(results, method, data, asked) for data, asked in COLUMNS]
        lines.append(f"| {method} | {' | '.join(map(cell, means))} |")
    seeds, asked = results["size"]["seeds"], results["size"]["asked"]
    least = asked - max(results["left_out"].values())
    return [
        *lines,
        "",
        f"Percent right, mean of {seeds} seeds ± half of its 95 % interval. Of the {asked} problems those "
        f"that a model was not trained on, at least {least}.",
        "",
    ]


def difference_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of differences to SFT."""
    lines = header("to SFT", problem_columns())
    for method in [name for name in methods_of(results) if name != "SFT"]:
        means = [difference_to_sft(results, method, data, asked) for data, asked in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cell(value, '+') for value in means)} |")
    return [
        *lines,
        "",
        "Points above SFT on the same data, mean of the seeds' differences ± half of its 95 % interval.",
        "",
    ]


def wrong_data_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of accuracies after partly wrong data, by method and learning rate."""
    scores = {method: by_rate(results, method, WRONG) for method in methods_of(results)}
    heads = [*scores, *(f"{method} to SFT" for method in scores if method != "SFT")]
    lines = header(f"{WRONG}: learning rate, asked", heads)
    for asked, rate in product(DATA[WRONG].asked, scores["SFT"]):
        of_seeds = {
            method: {seed: right[asked] for seed, right in of_method[rate].items()}
            for method, of_method in scores.items()
        }
        sft = of_seeds["SFT"]
        cells = [cell(mean(list(values.values()))) for values in of_seeds.values()]
        for method in [name for name in of_seeds if name != "SFT"]:
            difference_at_rate = mean([value - sft[seed] for seed, value in of_seeds[method].items()])
            cells.append(cell(difference_at_rate, "+"))
        lines.append(f"| {rate:g}, {title(asked)} | {' | '.join(cells)} |")
    return [*lines, "", "Percent right, and points above SFT with the same learning rate and seed.", ""]


def distribution_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of the shares of tokens by p, with the learning rates."""
    heads = "| fine-tuned on | | p < 0.05 | 0.05 to 0.95 | p >= 0.95 | learning rate |"
    lines = [heads, "|---|---|---|---|---|---|"]
    for data in DATA:
        for name, counts in histogram_sums(results, data).items():
            groups = (counts[0], sum(counts[1:-1]), counts[-1])
            cells = " | ".join(f"{100 * group / sum(counts):.2f} %" for group in groups)
            rate = f"{runs_of(results, name, data)[0]['rate']:g}" if name in ALPHAS else ""
            lines.append(f"| {data} | {name} | {cells} | {rate} |")
    return [
        *lines,
        "",
        "Share of the supervised tokens of held-out problems of three, by the p of the right token.",
        "",
    ]


def rate_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of accuracies used to select the learning rates."""
    lines = header("learning rate: task", list(ALPHAS))
    for task in TASKS:
        for rate in results["size"]["rates"][task]:
            cells = [
                f"{trial['accuracy']:.1f}"
                for trial in results["rates"]
                if trial["rate"] == rate and DATA[trial["data"]].task == task
            ]
            lines.append(f"| {rate:g}: {task} | {' | '.join(cells)} |")
    return [*lines, "", "Percent right on problems of three for choosing, one seed.", ""]


def histogram_sums(results: Mapping[str, Any], data: str) -> dict[str, list[int]]:
    """Return the histograms of p before fine-tuning ("base") and of each method, summed over seeds."""
    sums = {"base": results["before"][data]}
    for method in ALPHAS:
        of_seeds = [run["histogram"] for run in runs_of(results, method, data)]
        sums[method] = [sum(counts) for counts in zip(*of_seeds, strict=True)]
    return sums


COLORS = {"SFT": "#d55e00", "alpha 0.5": "#009e73", "DFT": "#0072b2", "base": "#8a8a8a"}


def accuracy_figure(results: Mapping[str, Any]) -> Figure:
    """Draw the means over seeds as bars with intervals, the seeds as dots, and the base model as lines."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    widths = [len(data.asked) for data in DATA.values()]
    panels = figure.subplots(1, len(DATA), sharey=True, width_ratios=widths)
    for axes, (name, data) in zip(panels, DATA.items(), strict=True):
        for index, method in enumerate(ALPHAS):
            means = [accuracy(results, method, name, asked) for asked in data.asked]
            positions = [position + 0.26 * (index - 1) for position in range(len(data.asked))]
            heights, halves = [mean.value for mean in means], [mean.half for mean in means]
            axes.bar(positions, heights, 0.24, color=COLORS[method], label=method)
            axes.errorbar(positions, heights, halves, fmt="none", ecolor="#1c1c1c", capsize=3)
            for position, asked in zip(positions, data.asked, strict=True):
                dots = [run["right"][asked] for run in runs_of(results, method, name)]
                axes.plot([position] * len(dots), dots, ".", color="#1c1c1c", markersize=3)
        for position, asked in enumerate(data.asked):
            label = "base" if position == 0 else None
            ends = (position - 0.42, position + 0.42)
            axes.hlines(results["base"][asked], *ends, color=COLORS["base"], linestyle="--", label=label)
        axes.set_xticks(range(len(data.asked)), [title(asked) for asked in data.asked], fontsize=8)
        axes.set_title(f"fine-tuned on: {name}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("answers right, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def histogram_figure(results: Mapping[str, Any]) -> Figure:
    """Draw the histograms of p before and after fine-tuning, as in Figure 2 of the paper."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    edges = [index / BINS for index in range(BINS + 1)]
    for axes, data in zip(figure.subplots(1, len(DATA), sharey=True), DATA, strict=True):
        for name, counts in histogram_sums(results, data).items():
            shares = [count / sum(counts) for count in counts]
            axes.stairs(shares, edges, color=COLORS[name], label=name, linewidth=1.6)
        axes.set_yscale("log")
        axes.set_title(f"fine-tuned on: {data}", fontsize=10)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("p of the right token, held-out problems of three", fontsize=9)
    figure.axes[0].set_ylabel("share of tokens")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure
