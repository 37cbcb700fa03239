"""The tables and the picture of the comparison of all objectives."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.study.study_results import (
    COLORS,
    accuracy,
    accuracy_table,
    by_rate,
    cell,
    difference_table,
    difference_to_sft,
    header,
    mean,
    methods_of,
    runs_of,
    title,
)
from scripts.study.study_task import COLUMNS, DATA, TASKS, WRONG

SHORT = {
    ("right sums", "sums-three"): "right",
    ("right sums", "sums-five"): "right, longer",
    (WRONG, "sums-three"): "wrong",
    (WRONG, "sums-five"): "wrong, longer",
    ("differences", "differences-three"): "new",
    ("differences", "differences-five"): "new, longer",
    ("differences", "sums-three"): "old after new",
}
"""Short names of data sets and problems."""


def summary_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of significant differences to SFT, and of the accuracies on two tasks."""
    lines = header(
        "", ["better than SFT", "worse than SFT", "wrong data, against the base model", "new task"]
    )
    for method in methods_of(results):
        texts: dict[bool, list[str]] = {True: [], False: []}
        if method != "SFT":
            for column, name in SHORT.items():
                difference = difference_to_sft(results, method, *column)
                if abs(difference.value) > difference.half:
                    texts[difference.value > 0].append(f"{name} ({difference.value:+.1f})")
        wrong = accuracy(results, method, WRONG, "sums-three").value - results["base"]["sums-three"]
        new = accuracy(results, method, "differences", "differences-three").value
        cells = [", ".join(names) or "-" for names in texts.values()]
        lines.append(f"| {method} | {' | '.join(cells)} | {wrong:+.1f} | {new:.0f} % |")
    return [*lines, ""]


def same_rate_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of SFT on partly wrong data by rate, and of differences to SFT at the same rate."""
    files, of_sft = DATA[WRONG].asked, by_rate(results, "SFT", WRONG)
    lines = header(WRONG, ["learning rate", *(title(asked) for asked in files)])
    for rate, scores in of_sft.items():
        means = [mean([right[asked] for right in scores.values()]) for asked in files]
        cells = " | ".join(map(cell, means))
        lines.append(f"| SFT | {rate:g} | {cells} |")
    for method in methods_of(results):
        if method != "SFT":
            runs = runs_of(results, method, WRONG)
            base = of_sft[runs[0]["rate"]]
            means = [
                mean([run["right"][asked] - base[run["seed"]][asked] for run in runs]) for asked in files
            ]
            cells = " | ".join(cell(value, "+") for value in means)
            lines.append(f"| {method} to SFT | {runs[0]['rate']:g} | {cells} |")
    return [*lines, "", "Percent right, and points above SFT with the same learning rate and seed.", ""]


def rate_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of the learning rates that were tried, with the accuracies on validation problems."""
    lines = header("", list(TASKS))
    selected = {(run["method"], DATA[run["data"]].task): run["rate"] for run in results["runs"]}
    texts: dict[tuple[str, str], list[str]] = {}
    for trial in sorted(results["rates"], key=lambda trial: trial["rate"]):
        key = trial["method"], DATA[trial["data"]].task
        text = f"{trial['rate']:g}: {trial['accuracy']:.1f}"
        texts.setdefault(key, []).append(f"**{text}**" if trial["rate"] == selected[key] else text)
    for method in methods_of(results):
        lines.append(f"| {method} | {' | '.join(', '.join(texts[method, task]) for task in TASKS)} |")
    return [
        *lines,
        "",
        "Percent right on problems of three for choosing, one seed. The chosen rates are bold.",
        "",
    ]


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = (accuracy_table, difference_table, summary_table, same_rate_table, rate_table)
    return "\n".join(line for part in parts for line in part(results))


def accuracy_figure(results: Mapping[str, Any]) -> Figure:
    """Draw the mean of each method with its interval, the seeds as dots, and the base model as a line."""
    methods = methods_of(results)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for axes, (data, asked) in zip(panels, COLUMNS, strict=True):
        for place, method in enumerate(methods):
            right = accuracy(results, method, data, asked)
            color = COLORS.get(method, "#444444")
            axes.errorbar(right.value, place, xerr=right.half, fmt="o", color=color, capsize=3, markersize=5)
            dots = [run["right"][asked] for run in runs_of(results, method, data)]
            axes.plot(dots, [place] * len(dots), ".", color="#1c1c1c", markersize=3)
        axes.axvline(results["base"][asked], color=COLORS["base"], linestyle="--", label="base")
        sft = accuracy(results, "SFT", data, asked).value
        axes.axvline(sft, color=COLORS["SFT"], linestyle=":", label="mean of SFT")
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -2), min(high, 102))  # intervals may extend beyond what is possible
        axes.set_title(f"{data}:\n{title(asked)}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    figure.supxlabel("answers right, %", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure
