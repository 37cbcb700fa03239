"""The files that `--preflight True` writes: `preflight.json`, and a self-contained page, `preflight.html`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dft.files import convert_write_errors, write_atomically
from dft.report.pages.figures import histogram_figure
from dft.report.pages.foretelling import foretelling_figure
from dft.report.pages.history import Histogram
from dft.report.pages.images import inline_svg
from dft.report.pages.run import render


def write_preflight(report: dict[str, Any], folder: Path) -> None:
    """Write `preflight.json` and `preflight.html`.

    Args:
        report: `preflight_report`.
        folder: the output directory.

    Raises:
        UserError: the folder cannot be written to.
    """
    with convert_write_errors(folder, "--output_dir"):
        write_atomically(folder / "preflight.json", [json.dumps(report, indent=2, ensure_ascii=False)])
        write_atomically(folder / "preflight.html", [preflight_page(report)])


def preflight_page(report: dict[str, Any]) -> str:
    """Return the HTML of `preflight_report`."""
    files = report["files"]
    groups = {"all": report["whole"], **(files if len(files) > 1 else {})}
    figures = []
    for index, (name, statistics) in enumerate(groups.items()):
        figure = histogram_figure(None, Histogram(0, np.array(statistics["p_histogram"])))
        figures.append((name, inline_svg(figure, f"p-{index}", name)))
    foretold = report.get("objectives")
    picture = foretold and inline_svg(foretelling_figure(foretold), "shares", "where the gradient goes")
    shown = {"report": report, "groups": groups, "figures": figures}
    return render("preflight.html.jinja", **shown, foretold=foretold, picture=picture)
