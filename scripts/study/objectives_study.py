"""Compare all objectives on the small tasks of study.py, each with a learning rate selected for it.

    python scripts/study/objectives_study.py runs/objectives            # hours on two cores
    python scripts/study/objectives_study.py runs/quick --quick         # minutes, to test the script

Data, base model, problems and grading are those of study.py. Objectives have their default arguments. The
learning rate of each objective and task is selected on the validation problems. A range of rates is tried
first; it grows by one rate at a time while the best rate is at an end of it and better than all others.
Intervals are over seeds. Differences are between models of the same seed, that is, of the same data.

SFT is also trained on partly wrong data with the learning rates of the other methods, because a lower rate
alone makes it learn less from wrong answers.

The script writes objectives_study.json, table.md and accuracy.png. If it is interrupted, the same command
continues with the results that are in the folder.
"""

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import report_user_errors
from dft.loss.objectives import OBJECTIVES
from dft.ranks import quiet_libraries
from scripts.study.objectives_results import accuracy_figure, tables
from scripts.study.study import (
    FULL,
    METHODS,
    QUICK,
    Study,
    best_rates,
    outcome,
)
from scripts.study.study_results import write_results
from scripts.study.study_runs import SELECTION_SEED, Run, claim_folder, prepare
from scripts.study.study_task import DATA, WRONG, Size

OBJECTIVE_METHODS = dict(METHODS) | {
    name: ("--objective", name, *(("--base_scores", True) if objective.needs_base_logp else ()))
    for name, objective in OBJECTIVES.items()
    if name not in ("dft", "sft")
}
"""All objectives, by the names of the tables, and their flags of train_dft.py."""
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates that can be tried."""
ALL_SIZE = FULL._replace(seeds=3, rates={"sums": (1e-4, 3e-4), "differences": (1e-3, 3e-3, 1e-2)})
"""Size of the study. Its `rates` are those that are tried first."""
QUICK_SIZE = QUICK._replace(rates=dict.fromkeys(QUICK.rates, (1e-3, 3e-3)))


def rates_to_add(accuracies: Mapping[Run, float]) -> list[Run]:
    """Return the runs that extend the range of learning rates where the best rate is at an end of it.

    Args:
        accuracies: accuracy of each run on validation problems, for several methods and data sets.

    Returns:
        One run for each method and data set whose lowest or highest rate is better than all others, if
        `RATES` has a next one.
    """
    runs = []
    by_rate: dict[tuple[str, str], dict[float, float]] = {}
    for run, accuracy in accuracies.items():
        by_rate.setdefault((run.method, run.data), {})[run.rate] = accuracy
    for (method, data), tried in by_rate.items():
        for end, step in ((min(tried), -1), (max(tried), 1)):
            others = [accuracy for rate, accuracy in tried.items() if rate != end]
            place = RATES.index(end) + step
            if all(accuracy < tried[end] for accuracy in others) and 0 <= place < len(RATES):
                runs.append(Run(method, data, SELECTION_SEED, RATES[place]))
    return runs


def select_rates(study: Study) -> dict[Run, float]:
    """Return the accuracy of each method with each learning rate that was tried, on validation problems."""
    accuracies = study.select_rates()
    step = 1
    while runs := rates_to_add(accuracies):
        print(f"  {len(runs)} further learning rates", flush=True)
        accuracies |= study.validate(runs, f"-{step}")
        step += 1
    return accuracies


def sft_at_other_rates(best: Mapping[tuple[str, str], float], seeds: int) -> list[Run]:
    """Return the runs of SFT on partly wrong data with each rate that was selected for another method."""
    task = DATA[WRONG].task
    rates = {rate for (_, of_task), rate in best.items() if of_task == task} - {best["SFT", task]}
    return [Run("SFT", WRONG, seed, rate) for rate in sorted(rates) for seed in range(seeds)]


def run_study(folder: Path, size: Size) -> dict[str, Any]:
    """Run all steps of the study, and return the content of objectives_study.json."""
    description = {**size._asdict(), "methods": list(OBJECTIVE_METHODS)}
    with claim_folder(folder, description), ThreadPoolExecutor(2) as pool:
        study = Study(folder, size, pool, OBJECTIVE_METHODS)
        print("training the base model", flush=True)
        study.train_base()
        print(f"selecting learning rates for {len(OBJECTIVE_METHODS)} methods", flush=True)
        accuracies = select_rates(study)
        best = best_rates(accuracies)
        print("comparing the methods", flush=True)
        runs = study.runs_at(best)
        scores = study.test(runs)
        at_other_rates = study.test_on_wrong_data(sft_at_other_rates(best, size.seeds))
    return outcome(study, accuracies, runs, scores, at_other_rates)


def main() -> None:
    report_user_errors()
    prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="almost no data, to test the script")
    options = parser.parse_args()
    quiet_libraries()
    results = run_study(options.folder, QUICK_SIZE if options.quick else ALL_SIZE)
    figures = {"accuracy": accuracy_figure(results)}
    write_results(results, options.folder, "objectives_study", tables(results), figures)
    if options.quick:
        print("--quick: these figures only show that every step ran")


if __name__ == "__main__":
    main()
