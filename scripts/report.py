"""Write the page of a run or a page that compares several runs, or show runs live in a browser.

    python scripts/report.py runs/first                        # runs/first/report.html and report.png
    python scripts/report.py runs/sft runs/dft runs/half       # report_comparison.html and .png
    python scripts/report.py runs/sft runs/dft --output sft_and_dft.html
    python scripts/report.py --serve runs                      # all runs in a folder, while they go on

A run is given by its --output_dir or by the report.json in it. For an older or interrupted run without
report.json, the page shows the log in trainer_state.json of the run or of its newest checkpoint.

--serve looks for runs in the folders and two levels below, writes nothing, and listens on this machine only.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors
from dft.report.live_runs import MAX_FOLDERS, exceeds_search, find_runs
from dft.report.pages.comparison import comparison_page, comparison_picture, runs_of
from dft.report.pages.run import REPORT_PAGE, run_page, run_picture, write_page
from dft.report.saved_report import folder_of, load_report
from dft.report.server import LivePages, ReportServer

COMPARISON = "report_comparison.html"
PORT, HOST, SECONDS = 8000, "127.0.0.1", 10


def main() -> None:
    report_user_errors()
    options = parse_options()
    if options.serve:
        serve(options)
    else:
        write(options.runs, options.output)


def parse_options() -> argparse.Namespace:
    """Return the options.

    Raises:
        UserError: flags that conflict or are missing.
    """
    parser = argparse.ArgumentParser(description="Write the page of a run, or one that compares runs.")
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="*", help="an --output_dir or its report.json"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        type=Path,
        help=f"where to write the page, with its figures as .png (default: {REPORT_PAGE} in the folder of a "
        f"single run, {COMPARISON} in the current folder for several)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="show the runs in RUN, or below it, in a browser, and keep the pages up to date; writes nothing",
    )
    parser.add_argument("--port", type=int, help=f"port for --serve (default: {PORT}; 0: a free one)")
    parser.add_argument(
        "--host", help=f"address for --serve (default: {HOST}, which only this machine can reach)"
    )
    parser.add_argument(
        "--refresh", metavar="SECONDS", type=int, help=f"how often an open page asks (default: {SECONDS})"
    )
    options = parser.parse_args()
    if not options.runs:
        raise UserError("RUN: name the --output_dir of a run, or with --serve a folder of runs, such as runs")
    for name in ("port", "host", "refresh"):
        if vars(options)[name] is not None and not options.serve:
            raise UserError(f"--{name} has no effect without --serve")
    if options.serve and options.output is not None:
        raise UserError(f"--output {options.output}: --serve writes no page; leave out one of them")
    return options


def serve(options: argparse.Namespace) -> None:
    """Serve the pages of runs until Ctrl-C.

    Raises:
        UserError: a folder does not exist, or the port cannot be used.
    """
    for run in options.runs:
        if not run.exists():
            raise UserError(
                f"{run}: no such file or folder; name a folder of runs, or the --output_dir of one"
            )
    port = PORT if options.port is None else options.port
    seconds = SECONDS if options.refresh is None else options.refresh
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}: must lie in [0, 65535]")
    if seconds < 1:
        raise UserError(f"--refresh {seconds}: must be at least 1 second")
    folders = [folder_of(run) for run in options.runs]
    with ReportServer(LivePages(folders, seconds), options.host or HOST, port) as server:
        count = len(find_runs(folders))
        print(f"{count} run{'' if count == 1 else 's'} at {server.url} (Ctrl-C ends this)", flush=True)
        if exceeds_search(folders):
            print(
                f"warning     only the first {MAX_FOLDERS:,} folders are searched, so runs may be missing; "
                "name folders closer to the runs"
            )
        if server.is_local:
            there = server.server_address[1]
            print(
                f"from another machine: ssh -L {there}:127.0.0.1:{there} THIS_MACHINE, then the same address"
            )
        else:
            print("warning     everyone who can reach this address can read the conversations in the reports")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended; the runs go on")


def write(runs: list[Path], output: Path | None) -> None:
    """Write the page of one run, or the page that compares several.

    Raises:
        UserError: a run cannot be read, or the page cannot be written.
    """
    if output is not None and output.suffix != ".html":
        raise UserError(f"--output {output}: must end in .html; the figures get the same name with .png")
    reports = [load_report(run) for run in runs]
    for run, report in zip(runs, reports, strict=True):
        if not report["log"]:
            print(f"{run}: has not logged any metrics yet, so its page has no curves", file=sys.stderr)
    folders = [folder_of(run) for run in runs]
    if len(reports) == 1:
        file = output or folders[0] / REPORT_PAGE
        html, picture = run_page(reports[0], folders[0]), run_picture(reports[0])
    else:
        file = output or Path(COMPARISON)
        compared = runs_of(reports, folders)
        html, picture = comparison_page(compared), comparison_picture(compared)
    with convert_write_errors(file.parent, "--output" if output else "RUN"):
        write_page(html, picture, file)
    print(file)


if __name__ == "__main__":
    main()
