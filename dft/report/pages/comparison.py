"""Several runs on one page: SFT against DFT, one alpha against another, or anything else that differs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dft.metrics import ACC, AVG_P, COMPARED, ENTROPY, MACHINE, NLL, QUALITY, Metric
from dft.report.pages import sections
from dft.report.pages.figures import Line, Look, histogram_figure, look_of, lowest_share, overview_figure
from dft.report.pages.formatting import format_argument, format_number
from dft.report.pages.history import EVAL, Histogram, best_of, histograms, series
from dft.report.pages.images import inline_svg
from dft.report.pages.run import Panel, curve_panel, render

OF_THE_RUN = ("output_dir", "run_name", "logging_dir")
"""Arguments that differ between any two runs."""
ALPHA = "dft_alpha"
PICTURED = (NLL, AVG_P, ACC, ENTROPY)
"""In the picture: of the evaluations, and below them of training."""


@dataclass(frozen=True)
class Run:
    """A run on a page of several: its name there, its report, and how its lines look."""

    label: str
    report: dict[str, Any]
    folder: Path
    look: Look


@dataclass(frozen=True)
class Column:
    """Last values of a metric, in the order of the runs. `note` says which of them is better."""

    metric: Metric
    values: list[str]
    best: list[bool]
    note: str


def runs_of(reports: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[Run]:
    """The runs by names that are unique.

    Args:
        reports: of the runs.
        folders: their output directories, in the same order.
    """
    labels = labels_of(reports, folders)
    return [
        Run(label, report, folder, look_of(place))
        for place, (label, report, folder) in enumerate(zip(labels, reports, folders, strict=True))
    ]


def labels_of(reports: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[str]:
    """Names of runs, with the method where it differs, and whatever else it takes to make them unique."""
    labels = [report["name"] for report in reports]
    if len({sections.method(report) for report in reports}) > 1:
        labels = [_added(label, sections.method(one)) for label, one in zip(labels, reports, strict=True)]
    for name, values in differing_arguments(reports).items():
        repeated = Counter(labels)
        if name != ALPHA and max(repeated.values()) > 1:
            labels = [
                _added(label, f"{name} {value}") if _differs(label, labels, values) else label
                for label, value in zip(labels, values, strict=True)
            ]
    for distinction in (list(map(str, folders)), [str(place) for place in range(1, len(labels) + 1)]):
        repeated = Counter(labels)
        labels = [
            _added(label, more) if repeated[label] > 1 else label
            for label, more in zip(labels, distinction, strict=True)
        ]
    return labels


def _added(label: str, more: str) -> str:
    return f"{label}, {more}" if more else label


def _differs(label: str, labels: list[str], values: list[str]) -> bool:
    """Whether runs of the same label have different values."""
    return len({value for one, value in zip(labels, values, strict=True) if one == label}) > 1


def differing_arguments(reports: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Arguments that are not the same for all runs, with their values as text.

    A run that is known by `run_args.yaml` alone has only what it was given: there "not given" is the value of
    what another run was given.
    """
    names = dict.fromkeys(name for report in reports for name in report["arguments"])
    found = {}
    for name in names:
        known = [format_argument(one["arguments"][name]) for one in reports if name in one["arguments"]]
        absent = len(known) < len(reports) and any(name in one["given"] for one in reports)
        if name not in OF_THE_RUN and (len(set(known)) > 1 or absent):
            found[name] = [
                format_argument(one["arguments"][name]) if name in one["arguments"] else "not given"
                for one in reports
            ]
    return found


def by_value(arguments: dict[str, list[str]], runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """A row for each value: the argument, named in the first of its rows, the value, and who has it."""
    rows = []
    for name, values in arguments.items():
        for value in dict.fromkeys(values):
            having = [run for run, own in zip(runs, values, strict=True) if own == value]
            rows.append((name if value == values[0] else "", value, having))
    return rows


def comparison_page(runs: Sequence[Run]) -> str:
    """The HTML that lays runs over one another."""
    reports = [run.report for run in runs]
    return render(
        "comparison.html.jinja",
        runs=runs,
        methods=[sections.method(report) or "–" for report in reports],
        models=[report["model"].get("name") or "–" for report in reports],
        notes=comparison_notes(runs),
        machine=columns(runs, "", MACHINE),
        seconds=[dict(sections.throughput(report["log"])).get("run time", "–") for report in reports],
        tables=[
            (title, found)
            for title, prefix in (("Evaluation, last", EVAL), ("Training, last line of the log", ""))
            if (found := columns(runs, prefix, QUALITY))
        ],
        differing=by_value(differing_arguments(reports), runs),
        curves=curve_panels(runs),
        histograms=histogram_panels(runs),
        distributions=distributions(runs),
    )


def columns(runs: Sequence[Run], prefix: str, metrics: Sequence[Metric]) -> list[Column]:
    """The last values of the metrics that any run has.

    The best is marked, except of a metric that means something else for each alpha, where alphas differ.
    """
    same_alpha = len({(run.report["method"], run.report["alpha"]) for run in runs}) == 1
    made = []
    for metric in metrics:
        last = [series(run.report["log"], prefix + metric.name).last for run in runs]
        if all(value is None for value in last):
            continue
        comparable = same_alpha or not metric.of_alpha
        if metric.better is None:
            note = "no best"
        else:
            note = f"{metric.better} is better" if comparable else "not comparable across methods"
        best = best_of(last, metric) if comparable else [False] * len(runs)
        made.append(Column(metric, [format_number(value) for value in last], best, note))
    return made


def comparison_notes(runs: Sequence[Run]) -> list[str]:
    """What stands between the runs and a fair comparison."""
    reports = [run.report for run in runs]
    said = []
    if len({(report["method"], report["alpha"]) for report in reports}) > 1:
        said.append(
            f"{names(metric for metric in QUALITY if metric.of_alpha)} depend on method and alpha, and are "
            "not comparable across methods: no best is marked of them. Compare "
            f"{names(metric for metric in (AVG_P, ACC, NLL))}."
        )
    if len({report["model"].get("name") for report in reports}) > 1:
        said.append(
            "The models differ. Where their tokenizers differ too, a token is not the same amount of text, "
            "and metrics per token cannot be compared."
        )
    counts = {series(report["log"], f"{EVAL}supervised_tokens").last for report in reports} - {None}
    if len(counts) > 1:
        told = ", ".join(f"{count:,.0f}" for count in sorted(counts))
        said.append(
            f"The evaluations are not of the same tokens ({told}), so their metrics cannot be compared."
        )
    ends = {tuple(series(report["log"], EVAL + NLL.name).steps[-1:].tolist()) for report in reports}
    if len(ends) > 1:
        said.append("The last evaluations are of different steps.")
    return said


def names(metrics: Iterable[Metric]) -> str:
    """Return the names of at least two metrics as a list in a sentence."""
    *first, last = (metric.name for metric in metrics)
    return f"{', '.join(first)} and {last}"


def lines_of_runs(runs: Sequence[Run], key: str) -> list[Line]:
    """A metric of all runs that have it."""
    lines = [Line(run.label, series(run.report["log"], key), run.look) for run in runs]
    return [line for line in lines if len(line.series)]


def curve_panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """By heading, the metrics of the evaluations, and of training."""
    made = {}
    for prefix, title in ((EVAL, "Evaluation"), ("", "Training")):
        found = {metric: lines_of_runs(runs, prefix + metric.name) for metric in COMPARED}
        panels = [
            curve_panel(metric, lines, f"{title.lower()}-{metric.name}")
            for metric, lines in found.items()
            if lines
        ]
        if panels:
            made[title] = panels
    return made


def histogram_panels(runs: Sequence[Run]) -> list[tuple[Run, Panel]]:
    """Of each run that has histograms, the first and the newest; all to one scale."""
    shown = [histograms(run.report["log"]) for run in runs]
    every = [one for several in shown for one in several]
    if not every:
        return []
    floor = lowest_share(every)
    return [
        (run, _histogram_panel(f"p-{place}", run.label, several, floor))
        for place, (run, several) in enumerate(zip(runs, shown, strict=True))
        if several
    ]


def _histogram_panel(name: str, label: str, shown: list[Histogram], floor: float) -> Panel:
    before, after = (shown[0] if len(shown) > 1 else None), shown[-1]
    figure = histogram_figure(before, after, floor)
    return Panel(label, inline_svg(figure, name, f"Tokens by p of {label}, step {after.step}"), "")


def distributions(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    """For a table: the run and the step, and shares of tokens by p."""
    return [
        (f"{run.label}, step {one['step']:,}", one)
        for run in runs
        for one in sections.distribution(histograms(run.report["log"]))
    ]


def comparison_picture(runs: Sequence[Run]) -> Figure:
    """The most important curves of runs in one picture."""
    panels = {}
    for prefix, name in ((EVAL, "evaluation"), ("", "training")):
        for metric in PICTURED:
            if lines := lines_of_runs(runs, prefix + metric.name):
                panels[f"{metric.name}, {name}"] = (metric, lines)
    return overview_figure(f"{len(runs)} runs", panels, None)
