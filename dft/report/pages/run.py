"""The page of one run, `report.html`, which is self-contained, and its main figures, `report.png`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from dft.files import write_atomically
from dft.metrics import CURVES, EVAL, FURTHER_CURVES, MACHINE, OVERVIEW, Metric, evaluation_prefixes
from dft.report.pages import sections
from dft.report.pages.base_scores import base_scores_views, visible
from dft.report.pages.figures import (
    TRAIN,
    Line,
    LineStyle,
    curve_figure,
    histogram_figure,
    overview_figure,
    style_of_evaluation,
)
from dft.report.pages.formatting import allow_breaks, format_number, mark_flags, replace_unprintable
from dft.report.pages.history import (
    Log,
    file_series,
    first_and_last_histogram,
    histograms,
    main_prefix,
    nonfinite_steps,
    series,
    set_title,
)
from dft.report.pages.images import inline_svg, write_png
from dft.report.pages.samples import sample_views
from dft.report.pages.tokens import SHADES, conversation_views
from dft.report.samples_file import SAMPLES, read_samples

REPORT_PAGE = "report.html"
TEMPLATES = Path(__file__).parent


def write_report_page(report: dict[str, Any], folder: Path) -> None:
    """Write `report.html` and `report.png` into the folder of a run, each atomically.

    Args:
        report: the content of `report.json`.
        folder: the output directory of the run; the page lists the files in it.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_page(run_page(report, folder), run_picture(report), folder / REPORT_PAGE)


def write_page(html: str, picture: Figure, file: Path) -> None:
    """Write a page, and its picture under the same name with the extension .png."""
    write_atomically(file, [html])
    write_png(picture, file.with_suffix(".png"))


@dataclass(frozen=True)
class Panel:
    """A figure with its heading and caption."""

    name: str
    svg: Markup
    text: str


def run_page(report: dict[str, Any], folder: Path) -> str:
    """Return the HTML of the page of one run."""
    return render("run_report.html.jinja", **run_values(report, folder))


def run_values(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the template of the page of one run shows."""
    log = report["log"]
    return {
        "report": report,
        "summary": sections.summary_rows(report, folder),
        "notes": sections.notes(report),
        "numbers": sections.number_tables(log),
        "legend": legend(log),
        "curves": curve_panels(log, CURVES),
        "further": curve_panels(log, FURTHER_CURVES),
        "histograms": histogram_panels(log),
        "base_scores": base_scores_views(report["base_scores"]),
        "samples": sample_views(read_samples(folder / SAMPLES)[0]),
        "conversations": conversation_views(report["tokens"]),
        "shades": range(SHADES),
        "file_series": file_series(log),
        "data": sections.data_rows(report["data"], folder),
        "machine": sections.machine_rows(log),
        "machine_curves": curve_panels(log, MACHINE),
        "given": sections.argument_rows(report["given"]),
        "arguments": sections.argument_rows(report["arguments"]),
        "environment": sections.argument_rows(report["environment"]),
        "existing_files": sections.existing_files(folder),
    }


def render(template: str, **values: Any) -> str:
    """Render a template of this folder. Values other than `Markup` are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, sentence=mark_flags, name=allow_breaks, visible=visible)
    return environment.get_template(template).render(values)


def lines_of_metric(log: Log, metric: Metric) -> list[Line]:
    """Return the curves of a metric in training and evaluation, where logged."""
    lines = [Line("training", series(log, metric.name), TRAIN)]
    for index, prefix in enumerate(evaluation_prefixes(log)):
        title, style = set_title(prefix), style_of_evaluation(index)
        lines.append(Line(title[0].lower() + title[1:], series(log, prefix + metric.name), style))
    return [line for line in lines if len(line.series)]


def legend(log: Log) -> list[tuple[str, LineStyle]]:
    """Return the name and the style of the curves of training and of each evaluation set."""
    titles = [set_title(prefix) for prefix in evaluation_prefixes(log)] or [set_title(EVAL)]
    styles = [(title[0].lower() + title[1:], style_of_evaluation(i)) for i, title in enumerate(titles)]
    return [("training", TRAIN), *styles]


def curve_panels(log: Log, metrics: Sequence[Metric]) -> list[Panel]:
    """Return a panel for each of the metrics that was logged."""
    logged = ((metric, lines_of_metric(log, metric)) for metric in metrics)
    return [curve_panel(metric, lines, metric.name) for metric, lines in logged if lines]


def curve_panel(metric: Metric, lines: Sequence[Line], name: str) -> Panel:
    """Return the panel of one metric.

    Args:
        metric: the metric.
        lines: its curves.
        name: an identifier that is unique in the page.
    """
    description = "; ".join(
        f"{line.label} from {format_number(line.series.first)} to {format_number(line.series.last)} "
        f"({len(line.series)} records)"
        for line in lines
    )
    return Panel(
        metric.name, inline_svg(curve_figure(metric, lines), name, f"{name}: {description}"), metric.meaning
    )


def histogram_panels(log: Log) -> list[tuple[Panel, list[dict[str, Any]]]]:
    """Return the histograms of p of each evaluation set that has them, and the rows of the table below."""
    panels = []
    for prefix in evaluation_prefixes(log):
        panel = histogram_panel(log, prefix)
        if panel is not None:
            panels.append((panel, sections.distribution(histograms(log, prefix))))
    return panels


def histogram_panel(log: Log, prefix: str) -> Panel | None:
    """Return the histograms of p of the first and the last evaluation; None if no evaluation has one."""
    pair = first_and_last_histogram(log, prefix)
    if pair is None:
        return None
    before, after = pair
    shares = ", ".join(
        f"{100 * after.between(low, high):.1f} % of p {low:g} to {high:g}" for low, high in sections.RANGES
    )
    name = "p-histogram" if prefix == EVAL else f"p-histogram-{prefix}"
    svg = inline_svg(histogram_figure(before, after), name, f"Tokens by p, step {after.step}: {shares}")
    return Panel(set_title(prefix), svg, sections.histogram_caption(before, after))


def run_picture(report: dict[str, Any]) -> Figure:
    """Return the main figures of a run as one picture."""
    log, steps = report["log"], report["steps"]
    parts = [report["name"], sections.method(report)]
    if steps:
        parts.append(f"step {steps['done']:,} of {steps['total']:,}")
    parts.append(report["status"])
    if keys := nonfinite_steps(log):
        parts.append(f"NaN or infinite: {', '.join(keys)}")
    logged = ((metric, lines_of_metric(log, metric)) for metric in OVERVIEW)
    return overview_figure(
        replace_unprintable("   ·   ".join(part for part in parts if part)),
        {metric.name: (metric, lines) for metric, lines in logged if lines},
        first_and_last_histogram(log, main_prefix(log)),
    )
