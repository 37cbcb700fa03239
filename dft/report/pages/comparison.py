"""The page that compares several runs, for example SFT with DFT or one alpha with another."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dft.metrics import (
    ACC,
    AVG_P,
    COMPARED,
    EVAL,
    MACHINE,
    NLL,
    OVERVIEW,
    QUALITY,
    Metric,
    evaluation_prefixes,
)
from dft.report.pages import sections
from dft.report.pages.figures import (
    Line,
    LineStyle,
    histogram_figure,
    lowest_share,
    overview_figure,
    style_of_run,
)
from dft.report.pages.formatting import format_argument, format_number
from dft.report.pages.history import (
    best_of,
    first_and_last_histogram,
    histograms,
    main_prefix,
    series,
    set_title,
)
from dft.report.pages.images import inline_svg
from dft.report.pages.run import Panel, curve_panel, render

IGNORED_ARGUMENTS = ("output_dir", "run_name", "logging_dir")
"""Arguments that differ between any two runs, and are not compared."""
ALPHA = "dft_alpha"
PICTURED = tuple(metric for metric in OVERVIEW if metric in QUALITY and not metric.of_alpha)
"""The metrics of report.png that can be compared between methods."""


@dataclass(frozen=True)
class ComparedRun:
    """A compared run.

    Attributes:
        label: its unique name in the page.
        report: its report, as `load_report` returns it.
        folder: its output directory.
        style: style of its lines.
    """

    label: str
    report: dict[str, Any]
    folder: Path
    style: LineStyle


@dataclass(frozen=True)
class Column:
    """The last values of a metric.

    Attributes:
        metric: the metric.
        values: formatted, in the order of the runs.
        best: whether each value is the best.
        note: whether higher or lower values are better.
    """

    metric: Metric
    values: list[str]
    best: list[bool]
    note: str


def runs_of(reports: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[ComparedRun]:
    """Return the runs to compare, with unique labels.

    Args:
        reports: their reports.
        folders: their output directories, in the same order.
    """
    labels = labels_of(reports, folders)
    return [
        ComparedRun(label, report, folder, style_of_run(index))
        for index, (label, report, folder) in enumerate(zip(labels, reports, folders, strict=True))
    ]


def labels_of(reports: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[str]:
    """Return unique labels of runs.

    A label consists of the run's name, the method if methods differ, the fewest differing arguments that make
    it unique, and, if necessary, the folder and the position.
    """
    labels = [report["name"] for report in reports]
    if len({sections.method(report) for report in reports}) > 1:
        labels = [
            _append(label, sections.method(report)) for label, report in zip(labels, reports, strict=True)
        ]
    for name, values in differing_arguments(reports).items():
        if name != ALPHA and max(Counter(labels).values()) > 1:
            labels = [
                _append(label, f"{name} {value}") if _differs(label, labels, values) else label
                for label, value in zip(labels, values, strict=True)
            ]
    for distinction in (list(map(str, folders)), [str(position) for position in range(1, len(labels) + 1)]):
        counts = Counter(labels)
        labels = [
            _append(label, more) if counts[label] > 1 else label
            for label, more in zip(labels, distinction, strict=True)
        ]
    return labels


def _append(label: str, more: str) -> str:
    return f"{label}, {more}" if more else label


def _differs(label: str, labels: list[str], values: list[str]) -> bool:
    """True if the runs with this label have different values."""
    return len({value for other, value in zip(labels, values, strict=True) if other == label}) > 1


def differing_arguments(reports: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the arguments that differ between runs, with their formatted values in the order of the runs.

    A run without `report.json` has only the arguments that were given to it, in `run_args.yaml`. Arguments
    that only other runs were given have the value "not given".
    """
    names = dict.fromkeys(name for report in reports for name in report["arguments"])
    differing = {}
    for name in names:
        having = [report["arguments"] for report in reports if name in report["arguments"]]
        values = [format_argument(arguments[name]) for arguments in having]
        is_absent = len(values) < len(reports) and any(name in report["given"] for report in reports)
        if name not in IGNORED_ARGUMENTS and (len(set(values)) > 1 or is_absent):
            differing[name] = [
                format_argument(report["arguments"][name]) if name in report["arguments"] else "not given"
                for report in reports
            ]
    return differing


def rows_by_value(
    arguments: dict[str, list[str]], runs: Sequence[ComparedRun]
) -> list[tuple[str, str, list[ComparedRun]]]:
    """Return a row for each value of each argument: the name (in its first row only), the value, the runs."""
    rows = []
    for name, values in arguments.items():
        for value in dict.fromkeys(values):
            runs_with_value = [run for run, other in zip(runs, values, strict=True) if other == value]
            rows.append((name if value == values[0] else "", value, runs_with_value))
    return rows


def comparison_page(runs: Sequence[ComparedRun]) -> str:
    """Return the HTML of the page that compares runs."""
    return render("comparison.html.jinja", **comparison_values(runs))


def comparison_values(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return what the template of the page that compares runs shows."""
    reports = [run.report for run in runs]
    return {
        "runs": runs,
        "methods": [sections.method(report) or "–" for report in reports],
        "models": [report["model"].get("name") or "–" for report in reports],
        "notes": comparison_notes(runs),
        "machine": columns(runs, "", MACHINE),
        "run_times": [dict(sections.machine_rows(report["log"])).get("run time", "–") for report in reports],
        "tables": [
            (title, shown)
            for title, prefix in (
                *((f"{set_title(prefix)}, last values", prefix) for prefix in prefixes_of(runs)),
                ("Training, last logged values", ""),
            )
            if (shown := columns(runs, prefix, QUALITY))
        ],
        "differing": rows_by_value(differing_arguments(reports), runs),
        "curves": curve_panels(runs),
        "histograms": histogram_panels(runs),
        "distributions": distributions(runs),
    }


def prefixes_of(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the prefix of the metrics of each evaluation set of any of the runs."""
    return evaluation_prefixes(record for run in runs for record in run.report["log"])


def columns(runs: Sequence[ComparedRun], prefix: str, metrics: Sequence[Metric]) -> list[Column]:
    """Return the last values of the metrics that any run logged.

    The best value is marked, unless the scale of the metric depends on alpha and the runs differ in alpha.

    Args:
        runs: the compared runs.
        prefix: "" for training, "eval_" for evaluation.
        metrics: the metrics to show.
    """
    same_alpha = len({(run.report["method"], run.report["alpha"]) for run in runs}) == 1
    shown = []
    for metric in metrics:
        last = [series(run.report["log"], prefix + metric.name).last for run in runs]
        if all(value is None for value in last):
            continue
        comparable = same_alpha or not metric.of_alpha
        if metric.better is None:
            note = "neither is better"
        else:
            note = f"{metric.better} is better" if comparable else "not comparable across methods"
        best = best_of(last, metric) if comparable else [False] * len(runs)
        shown.append(Column(metric, [format_number(value) for value in last], best, note))
    return shown


def comparison_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Return remarks on differences that prevent a fair comparison of the runs."""
    reports = [run.report for run in runs]
    remarks = []
    if len({(report["method"], report["alpha"]) for report in reports}) > 1:
        remarks.append(
            f"{names(metric for metric in QUALITY if metric.of_alpha)} depend on the method and on alpha, so "
            "they cannot be compared between methods and no best value is marked. Compare "
            f"{names(metric for metric in (AVG_P, ACC, NLL))}."
        )
    if len({report["model"].get("name") for report in reports}) > 1:
        remarks.append(
            "The models differ. If their tokenizers differ too, a token is not the same amount of text, and "
            "metrics per token cannot be compared."
        )
    for prefix in prefixes_of(runs):
        last_counts = (series(report["log"], f"{prefix}supervised_tokens").last for report in reports)
        counts = {count for count in last_counts if count is not None}
        if len(counts) > 1:
            numbers = ", ".join(f"{count:,.0f}" for count in sorted(counts))
            of_set = "" if prefix == EVAL else f" of {prefix.removeprefix(EVAL).rstrip('_')}"
            remarks.append(
                f"The evaluations{of_set} have different numbers of tokens ({numbers}), so their metrics "
                "cannot be compared."
            )
    logs = (report["log"] for report in reports)
    ends = {tuple(series(log, main_prefix(log) + NLL.name).steps[-1:].tolist()) for log in logs}
    if len(ends) > 1:
        remarks.append("The last evaluations are at different steps.")
    return remarks


def names(metrics: Iterable[Metric]) -> str:
    """Return the names of at least two metrics as a list in a sentence."""
    *first, last = (metric.name for metric in metrics)
    return f"{', '.join(first)} and {last}"


def lines_of_runs(runs: Sequence[ComparedRun], key: str) -> list[Line]:
    """Return the curves of a logged value, of all runs that have it."""
    lines = [Line(run.label, series(run.report["log"], key), run.style) for run in runs]
    return [line for line in lines if len(line.series)]


def curve_panels(runs: Sequence[ComparedRun]) -> dict[str, list[Panel]]:
    """Return the panels of evaluation and of training, by heading."""
    by_heading = {}
    for prefix, title in (*((prefix, set_title(prefix)) for prefix in prefixes_of(runs)), ("", "Training")):
        logged = ((metric, lines_of_runs(runs, prefix + metric.name)) for metric in COMPARED)
        panels = [
            curve_panel(metric, lines, f"{title.lower().replace(' ', '-')}-{metric.name}")
            for metric, lines in logged
            if lines
        ]
        if panels:
            by_heading[title] = panels
    return by_heading


def histogram_panels(runs: Sequence[ComparedRun]) -> list[tuple[ComparedRun, Panel]]:
    """Return the histograms of p of each run that has one, all on the same scale."""
    logs = [run.report["log"] for run in runs]
    pairs = [first_and_last_histogram(log, main_prefix(log)) for log in logs]
    logged = [histogram for pair in pairs if pair for histogram in pair if histogram is not None]
    if not logged:
        return []
    floor = lowest_share(logged)
    panels = []
    for index, (run, pair) in enumerate(zip(runs, pairs, strict=True)):
        if pair is not None:
            description = f"Tokens by p of {run.label}, step {pair[1].step}"
            svg = inline_svg(histogram_figure(*pair, floor), f"p-{index}", description)
            panels.append((run, Panel(run.label, svg, "")))
    return panels


def distributions(runs: Sequence[ComparedRun]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of the table of p: run and step, and the entry of `sections.distribution`."""
    return [
        (f"{run.label}, step {entry['step']:,}", entry)
        for run in runs
        for entry in sections.distribution(histograms(run.report["log"], main_prefix(run.report["log"])))
    ]


def comparison_picture(runs: Sequence[ComparedRun]) -> Figure:
    """Return the main curves of the runs as one picture."""
    panels = {}
    for prefix in (*prefixes_of(runs), ""):
        name = set_title(prefix).replace("Evaluation", "evaluation") if prefix else "training"
        for metric in PICTURED:
            if lines := lines_of_runs(runs, prefix + metric.name):
                panels[f"{metric.name}, {name}"] = (metric, lines)
    return overview_figure(f"{len(runs)} runs", panels, None)
