"""Helpers for all console output: print lines from rank 0 only, and format durations and numbers."""

import math
import textwrap

from dft.ranks import is_main_process

MAX_COLUMNS = 100
"""Longest line that is printed, apart from paths and words that are longer."""
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def say(*lines: str) -> None:
    """Print lines once, from rank 0."""
    if is_main_process():
        for line in lines:
            print(line, flush=True)


def clock(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, such as 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def wrap(label: str, text: str, indent: int = 12) -> list[str]:
    """Return a text as lines of at most `MAX_COLUMNS` characters, the first with a label before it.

    Words that are longer, such as paths, are not broken.

    Args:
        label: the text in the margin of the first line.
        text: the text to wrap.
        indent: width of the margin.
    """
    return textwrap.wrap(
        text,
        MAX_COLUMNS,
        initial_indent=f"{label:<{indent}}",
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def short_clock(seconds: float, width: int) -> str:
    """Format a duration as precisely as `width` characters allow: 99:59:59, 123h 45m or 1234h."""
    if not math.isfinite(seconds):
        return str(seconds)
    hours, minutes = divmod(round(seconds / 60), 60)
    return first_that_fits([clock(seconds), f"{hours}h {minutes:02}m", f"{hours}h"], width)


def short_number(value: float, width: int) -> str:
    """Format a number as precisely as `width` characters allow: 0.1235, 12.346, 12, 1.23M, 1.9e-5 or nan."""
    if not math.isfinite(value) or (isinstance(value, int) and len(str(value)) <= width):
        return str(value)
    magnitude = abs(value)
    if magnitude < 1e-3 and magnitude:
        exponents = [f"{value:.{digits}e}".replace("e-0", "e-") for digits in (2, 1, 0)]
        return first_that_fits(exponents, width)
    if magnitude < 1e4:
        return first_that_fits([f"{value:.{digits}f}" for digits in (4, 3, 2, 1, 0)], width)
    suffix, unit = next((item for item in SUFFIXES.items() if magnitude < 999.5 * item[1]), ("T", 1e12))
    return first_that_fits([f"{value / unit:.{digits}f}{suffix}" for digits in (2, 1, 0)], width)


def first_that_fits(texts: list[str], width: int) -> str:
    """Return the first text that fits in `width` characters, or the last one if none fits."""
    return next((text for text in texts if len(text) <= width), texts[-1])
