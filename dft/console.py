"""Console output of a run: printing from rank 0 and formatting numbers."""

from dft.ranks import is_main_process


def say(line: str) -> None:
    """Prints a line of this run once, from its first process."""
    if is_main_process():
        print(line, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def format_short(value: float | None) -> str:
    """Return a number with four significant digits, and no exponent for large values; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
