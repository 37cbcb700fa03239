"""Compare the training metrics of runs with a reference run, step by step.

    python scripts/compare_runs.py runs/reference runs/other [runs/another ...]

Prints the largest relative difference of each metric over the steps that both runs logged. Fails if there is
none.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.errors import UserError, report_user_errors
from dft.report.saved_report import load_report

METRICS = ("loss", "nll", "avg_p_correct", "objective", "grad_norm")
"""The compared metrics; not acc, since rounding errors can change which token is the most probable."""


def train_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the logged training metrics of a run, by step."""
    history = load_report(folder)["log"]
    return {record["step"]: record for record in history if "grad_norm" in record}


def largest_differences(reference: Path, other: Path) -> dict[str, float]:
    """Return the largest |other - reference| / |reference| of each metric.

    Raises:
        UserError: the runs have no logged step in common.
    """
    expected, actual = train_records(reference), train_records(other)
    steps = expected.keys() & actual.keys()
    if not steps:
        raise UserError(f"{other}: has no logged step in common with {reference}")
    return {
        name: max(
            abs(actual[step][name] - expected[step][name]) / abs(expected[step][name]) for step in steps
        )
        for name in METRICS
    }


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Compare the training metrics of runs.")
    parser.add_argument("reference", type=Path, help="the --output_dir to compare with")
    parser.add_argument("others", type=Path, nargs="+", help="the --output_dir of other runs")
    arguments = parser.parse_args()
    print(f"largest relative difference from {arguments.reference}, over the steps that both runs logged")
    print(f"{'':<24}" + "".join(f"{name:>15}" for name in METRICS))
    for other in arguments.others:
        differences = largest_differences(arguments.reference, other)
        print(f"{other.name:<24}" + "".join(f"{differences[name]:>15.1e}" for name in METRICS))


if __name__ == "__main__":
    main()
