"""The page of one run: `report.html`, one file with nothing to load, and `report.png` for a glance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from dft.files import write_atomically
from dft.metrics import CURVES, FURTHER_CURVES, MACHINE, OVERVIEW, Metric
from dft.report.pages import sections
from dft.report.pages.figures import EVALUATION, TRAIN, Line, curve_figure, histogram_figure, overview_figure
from dft.report.pages.formatting import allow_breaks, format_number, mark_flags, replace_unprintable
from dft.report.pages.history import EVAL, Log, histograms, not_finite, series
from dft.report.pages.images import inline_svg, write_png
from dft.report.pages.tokens import SHADES, conversations

PAGE = "report.html"
TEMPLATES = Path(__file__).parent


def write_report_page(report: dict[str, Any], folder: Path) -> None:
    """Writes `report.html` and `report.png` of a run into its folder, each as a whole.

    Args:
        report: the content of `report.json`.
        folder: the output directory of the run; what lies there is named in the page.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_page(run_page(report, folder), run_picture(report), folder / PAGE)


def write_page(html: str, picture: Figure, file: Path) -> None:
    """Writes a page, and its picture beside it."""
    write_atomically(file, [html])
    write_png(picture, file.with_suffix(".png"))


@dataclass(frozen=True)
class Panel:
    """A figure with its words."""

    name: str
    svg: Markup
    text: str


def run_page(report: dict[str, Any], folder: Path) -> str:
    """The HTML of one run."""
    log = report["log"]
    return render(
        "run_report.html.jinja",
        report=report,
        facts=sections.facts(report, folder),
        notes=sections.notes(report),
        evaluated=sections.first_last_best(log, EVAL),
        trained=sections.first_last_best(log, ""),
        curves=panels(log, CURVES),
        further=panels(log, FURTHER_CURVES),
        histogram=histogram_panel(log),
        distribution=sections.distribution(histograms(log)),
        conversations=conversations(report["tokens"]),
        shades=range(SHADES),
        files=sections.files_table(log),
        data=sections.data_rows(report["data"], folder),
        throughput=sections.throughput(log),
        machine=panels(log, MACHINE),
        given=sections.argument_rows(report["given"]),
        arguments=sections.argument_rows(report["arguments"]),
        environment=sections.argument_rows(report["environment"]),
        files_there=sections.files_there(folder),
    )


def render(template: str, **values: Any) -> str:
    """A template beside this file, filled in. Whatever is no `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, sentence=mark_flags, name=allow_breaks)
    return environment.get_template(template).render(values)


def lines_of_metric(log: Log, metric: Metric) -> list[Line]:
    """What training and evaluation logged of a metric; nothing where neither did."""
    both = (Line("training", series(log, metric.name), TRAIN),)
    both += (Line("evaluation", series(log, EVAL + metric.name), EVALUATION),)
    return [line for line in both if len(line.series)]


def panels(log: Log, metrics: Sequence[Metric]) -> list[Panel]:
    """Those of the metrics that were logged."""
    found = {metric: lines_of_metric(log, metric) for metric in metrics}
    return [curve_panel(metric, lines, metric.name) for metric, lines in found.items() if lines]


def curve_panel(metric: Metric, lines: Sequence[Line], name: str) -> Panel:
    """The curves of a metric. `name` is unique in the page."""
    told = "; ".join(
        f"{line.label} from {format_number(line.series.first)} to {format_number(line.series.last)} "
        f"({len(line.series)} records)"
        for line in lines
    )
    return Panel(
        metric.name, inline_svg(curve_figure(metric, lines), name, f"{name}: {told}"), metric.meaning
    )


def histogram_panel(log: Log) -> Panel | None:
    """Of p, at the first evaluation and the newest; None where no evaluation has it."""
    shown = histograms(log)
    if not shown:
        return None
    before, after = (shown[0] if len(shown) > 1 else None), shown[-1]
    told = ", ".join(
        f"{100 * after.between(low, high):.1f} % of p {low:g} to {high:g}" for low, high in sections.RANGES
    )
    svg = inline_svg(
        histogram_figure(before, after), "p-histogram", f"Tokens by p, step {after.step}: {told}"
    )
    return Panel("p", svg, sections.histogram_words(before, after))


def run_picture(report: dict[str, Any]) -> Figure:
    """The most important panels of a run in one picture."""
    log, steps = report["log"], report["steps"]
    parts = [report["name"], sections.method(report)]
    if steps:
        parts.append(f"step {steps['done']:,} of {steps['total']:,}")
    parts.append(report["status"])
    if broken := not_finite(log):
        parts.append(f"not finite: {', '.join(broken)}")
    shown = histograms(log)
    found = {metric: lines_of_metric(log, metric) for metric in OVERVIEW}
    return overview_figure(
        replace_unprintable("   ·   ".join(part for part in parts if part)),
        {metric.name: (metric, lines) for metric, lines in found.items() if lines},
        (shown[0] if len(shown) > 1 else None, shown[-1]) if shown else None,
    )
