"""The pages of `scripts/report.py --serve`: all runs on one page, and the page of each run."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dft.report.live_runs import LiveRun, State
from dft.report.pages import sections
from dft.report.pages.comparison import comparison_values, runs_of
from dft.report.pages.run import render, run_values

SCRIPT = (Path(__file__).parent / "live.js.jinja").read_text(encoding="utf-8")
"""The script that refreshes a page in the browser."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'"
"""The pages load nothing but this script, and connect to nothing but the server."""
MARKS = {
    State.STARTING: "◌", State.RUNNING: "▶", State.ENDED: "■", State.LOST: "✕", State.UNREADABLE: "✕",
}  # fmt: skip
FINISHED = "✓"


@dataclass(frozen=True)
class Refreshing:
    """How a page is kept up to date.

    Attributes:
        seconds: time between two requests.
        version: changes with the content of the page.
        time: local time at which the page was made.
    """

    seconds: int
    version: str
    time: str


@dataclass(frozen=True)
class Row:
    """A run in the table of all runs.

    Attributes:
        run: the run.
        mark: a sign for its state.
        is_shown: whether its curves are shown.
        share: share of its optimizer steps that are done, in percent; None if their number is not recorded.
        steps: its optimizer steps as text.
        left: the time it still needs, as text.
        updated: time of its last change, as text.
    """

    run: LiveRun
    mark: str
    is_shown: bool
    share: float | None
    steps: str
    left: str
    updated: str


def runs_page(
    rows: Sequence[LiveRun], shown: Sequence[LiveRun], folders: Sequence[Path], refreshing: Refreshing
) -> str:
    """Return the page of all runs.

    Args:
        rows: all runs.
        shown: those of them whose curves are shown.
        folders: where the server looks for runs.
        refreshing: how the page is kept up to date.
    """
    compared = runs_of([run.report for run in shown], [run.folder for run in shown])
    keys = {run.key for run in shown}
    return render(
        "live.html.jinja",
        **comparison_values(compared),
        rows=[table_row(run, run.key in keys) for run in rows],
        styled={run.key: item for run, item in zip(shown, compared, strict=True)},
        folders=[str(folder.absolute()) for folder in folders],
        refreshing=refreshing,
        policy=POLICY,
    )


def table_row(run: LiveRun, is_shown: bool) -> Row:
    """Return the row of a run in the table of all runs."""
    steps = run.report["steps"]
    done, total = steps.get("done", 0), steps.get("total", 0)
    machine = dict(sections.machine_rows(run.report["log"]))
    left = machine.get("time left", "–") if run.state is State.RUNNING else "–"
    moment = datetime.fromtimestamp(run.updated)
    is_today = moment.date() == datetime.now().date()
    return Row(
        run,
        FINISHED if run.report["status"] == "finished" else MARKS[run.state],
        is_shown,
        100 * done / total if total else None,
        f"{done:,} of {total:,}" if total else "–",
        left,
        moment.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M"),
    )


def live_run_page(run: LiveRun, refreshing: Refreshing) -> str:
    """Return the page of one run."""
    values = run_values(run.report, run.folder)
    return render("live_run.html.jinja", **values, refreshing=refreshing, policy=POLICY)
