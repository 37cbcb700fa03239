"""How far the training metrics of runs are from those of a reference, step by step.

    python scripts/compare_runs.py runs/reference runs/other [runs/another ...]

Prints the greatest relative difference of each metric over the steps that both have logged. Fails if there
is no such step.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.errors import UserError, report_user_errors
from dft.report.saved_report import load_report

METRICS = ("loss", "nll", "avg_p_correct", "objective", "grad_norm")


def train_records(folder: Path) -> dict[int, dict[str, Any]]:
    """What a run logged of its training, by step."""
    history = load_report(folder)["log"]
    return {record["step"]: record for record in history if "grad_norm" in record}


def greatest_differences(reference: Path, other: Path) -> dict[str, float]:
    """By metric, the greatest |other - reference| / |reference|."""
    expected, got = train_records(reference), train_records(other)
    steps = expected.keys() & got.keys()
    if not steps:
        raise UserError(f"{other}: has logged no step that {reference} has logged too")
    return {
        name: max(abs(got[step][name] - expected[step][name]) / abs(expected[step][name]) for step in steps)
        for name in METRICS
    }


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Compare the training metrics of runs.")
    parser.add_argument("reference", type=Path, help="the --output_dir to compare with")
    parser.add_argument("others", type=Path, nargs="+", help="the --output_dir of other runs")
    arguments = parser.parse_args()
    print(f"greatest relative difference from {arguments.reference}, over the steps that both have logged")
    print(f"{'':<24}" + "".join(f"{name:>15}" for name in METRICS))
    for other in arguments.others:
        differences = greatest_differences(arguments.reference, other)
        print(f"{other.name:<24}" + "".join(f"{differences[name]:>15.1e}" for name in METRICS))


if __name__ == "__main__":
    main()
