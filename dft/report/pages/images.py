"""Figures as they leave this program: SVG within a page, PNG as a file."""

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

DOTS = 110
"""Per inch of a PNG."""
# What a page does not need: the header, where matplotlib comes from, a style that would meet the whole page,
# and the font of its own that the page's replaces.
NEEDLESS = re.compile(
    r"\A.*?(?=<svg)|<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->"
    r"| xmlns(?::xlink)?=\"[^\"]*\"| version=\"1.1\""
    r"|(?<=[\";] )font-family: [^;\"]*;? ?|(?<=\")font-family: [^;\"]*;? ?",
    re.DOTALL,
)
SHORTHAND = re.compile(r"font: ([\d.]+px) [^;\"]*")
SIZE = re.compile(r" (?:width|height)=\"[\d.]+pt\"")
REFERENCE = re.compile(r"(?:url\(|href=\")#([^)\"]+)")
DECIMALS = re.compile(r"(?<=[\s\"(,-])\d+\.\d{3,}(?=[\s\",)])")  # of coordinates; text stands between > and <
ID = re.compile(r" id=\"([^\"]+)\"")


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """A figure to stand within HTML, as wide as its place there.

    Args:
        name: unique in the page; all ids begin with it.
        title: what those hear who do not see it.
    """
    stream = io.StringIO()
    with styled(), _without_warnings():
        figure.savefig(stream, format="svg")
    text = SHORTHAND.sub(r"font-size: \1", NEEDLESS.sub("", stream.getvalue()))
    opening, rest = text.split(">", 1)
    opening = SIZE.sub("", opening)
    # Only ids that something refers to are kept, counted in the order of their use.
    used = {old: f"{name}-{place}" for place, old in enumerate(dict.fromkeys(REFERENCE.findall(rest)))}
    rest = ID.sub(lambda found: f' id="{used[found[1]]}"' if found[1] in used else "", rest)
    rest = REFERENCE.sub(lambda found: found[0].replace(found[1], used[found[1]]), rest)
    rest = DECIMALS.sub(lambda found: f"{float(found[0]):.2f}", rest)
    rest = re.sub(r"\n\s*", "\n", rest).strip()
    return Markup(f'{opening} role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{rest}')


def write_png(figure: Figure, path: Path, notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes a picture so that whoever opens it finds all of it, or what was there before.

    Args:
        notes: text to keep within the file, by keyword.
    """
    stream = io.BytesIO()
    with styled(), _without_warnings():
        figure.savefig(stream, format="png", dpi=DOTS, metadata={"Software": None, **notes})
    write_bytes_atomically(path, [stream.getvalue()])


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Names of runs may be in letters that the font lacks; boxes in a picture are no matter for a log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
