"""Figures as SVG for HTML pages and as PNG files."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from dft.files import write_bytes_atomically
from dft.report.pages.figures import styled

DPI = 110
"""Resolution of a PNG."""
# The parts of matplotlib's SVG that a page does not need: the header, the metadata, a style that would apply
# to the whole page, and the font, which the page sets.
REMOVED = re.compile(
    r"\A.*?(?=<svg)|<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->"
    r"| xmlns(?::xlink)?=\"[^\"]*\"| version=\"1.1\""
    r"|(?<=[\";] )font-family: [^;\"]*;? ?|(?<=\")font-family: [^;\"]*;? ?",
    re.DOTALL,
)
SHORTHAND = re.compile(r"font: ([\d.]+px) [^;\"]*")
SIZE = re.compile(r" (?:width|height)=\"[\d.]+pt\"")
REFERENCE = re.compile(r"(?:url\(|href=\")#([^)\"]+)")
DECIMALS = re.compile(r"(?<=[\s\"(,-])\d+\.\d{3,}(?=[\s\",)])")  # only coordinates: text is between > and <
ID = re.compile(r" id=\"([^\"]+)\"")


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """Return a figure as SVG to embed in HTML, where it takes the width of its container.

    Args:
        figure: the figure.
        name: prefix of all ids, unique in the page.
        title: description for screen readers.
    """
    stream = io.StringIO()
    with styled(), _without_warnings():
        figure.savefig(stream, format="svg")
    text = SHORTHAND.sub(r"font-size: \1", REMOVED.sub("", stream.getvalue()))
    opening, body = text.split(">", 1)
    opening = SIZE.sub("", opening)
    # Keep only the ids that are referred to, numbered in the order of their use.
    used = {old: f"{name}-{number}" for number, old in enumerate(dict.fromkeys(REFERENCE.findall(body)))}
    body = ID.sub(lambda match: f' id="{used[match[1]]}"' if match[1] in used else "", body)
    body = REFERENCE.sub(lambda match: match[0].replace(match[1], used[match[1]]), body)
    body = DECIMALS.sub(lambda match: f"{float(match[0]):.2f}", body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    return Markup(f'{opening} role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{body}')


def write_png(figure: Figure, path: Path, notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a figure as a PNG file, atomically.

    Args:
        figure: the figure.
        path: the file.
        notes: text chunks to store in the file, by keyword.
    """
    stream = io.BytesIO()
    with styled(), _without_warnings():
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None, **notes})
    write_bytes_atomically(path, [stream.getvalue()])


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings about missing glyphs, since names of runs may use scripts that the font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
