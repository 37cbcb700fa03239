"""The preflight as files: `preflight.json`, and `preflight.html`, one file with nothing to load."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dft.files import convert_write_errors, write_atomically
from dft.report.pages.figures import histogram_figure
from dft.report.pages.history import Histogram
from dft.report.pages.images import inline_svg
from dft.report.pages.run import render


def write_preflight(report: dict[str, Any], folder: Path) -> None:
    """Writes both into the output directory.

    Raises:
        UserError: they cannot be written there.
    """
    with convert_write_errors(folder, "--output_dir"):
        write_atomically(folder / "preflight.json", [json.dumps(report, indent=2, ensure_ascii=False)])
        write_atomically(folder / "preflight.html", [preflight_page(report)])


def preflight_page(report: dict[str, Any]) -> str:
    """The HTML of `preflight_report`."""
    files = report["files"]
    groups = {"all": report["whole"], **(files if len(files) > 1 else {})}
    figures = [
        (
            name,
            inline_svg(
                histogram_figure(None, Histogram(0, np.array(one["p_histogram"]))), f"p-{number}", name
            ),
        )
        for number, (name, one) in enumerate(groups.items())
    ]
    return render("preflight.html.jinja", report=report, groups=groups, figures=figures)
