"""Write the page of a run, or a page that compares several runs.

    python scripts/report.py runs/first                        # runs/first/report.html and report.png
    python scripts/report.py runs/sft runs/dft runs/half       # report_comparison.html and .png
    python scripts/report.py runs/sft runs/dft --output sft_and_dft.html

A run is given by its --output_dir or by the report.json in it. For an older or interrupted run without
report.json, the page shows the log in trainer_state.json of the run or of its newest checkpoint.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors
from dft.report.pages.comparison import comparison_page, comparison_picture, runs_of
from dft.report.pages.run import REPORT_PAGE, run_page, run_picture, write_page
from dft.report.saved_report import folder_of, load_report

COMPARISON = "report_comparison.html"


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Write the page of a run, or one that compares runs.")
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="an --output_dir or its report.json"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        type=Path,
        help=f"where to write the page, with its figures as .png (default: {REPORT_PAGE} in the folder of a "
        f"single run, {COMPARISON} in the current folder for several)",
    )
    arguments = parser.parse_args()
    if arguments.output is not None and arguments.output.suffix != ".html":
        raise UserError(
            f"--output {arguments.output}: must end in .html; the figures get the same name with .png"
        )
    reports = [load_report(run) for run in arguments.runs]
    for run, report in zip(arguments.runs, reports, strict=True):
        if not report["log"]:
            print(f"{run}: has not logged any metrics yet, so its page has no curves", file=sys.stderr)
    folders = [folder_of(run) for run in arguments.runs]
    if len(reports) == 1:
        file = arguments.output or folders[0] / REPORT_PAGE
        html, picture = run_page(reports[0], folders[0]), run_picture(reports[0])
    else:
        file = arguments.output or Path(COMPARISON)
        runs = runs_of(reports, folders)
        html, picture = comparison_page(runs), comparison_picture(runs)
    with convert_write_errors(file.parent, "--output" if arguments.output else "RUN"):
        write_page(html, picture, file)
    print(file)


if __name__ == "__main__":
    main()
