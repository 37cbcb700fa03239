"""Compare the ranking of objectives by the preflight with the accuracies that the studies measured.

    python scripts/study/foretelling.py runs/foretelling
    python scripts/study/foretelling.py runs/foretelling --model models/smollm2   # all studies

The script writes the data of the studies again, trains the small base model, and runs
the preflight on the fine-tuning data of seed 0. It compares the order in which the preflight ranks the
methods with the accuracies in docs/study.json, docs/study_real.json and, for all objectives on the small
model, docs/objectives_study.json, and writes foretelling.json and table.md. Results that are in the folder
are not computed again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError, report_user_errors
from dft.ranks import quiet_libraries
from scripts.study.study import FULL, Study
from scripts.study.study_results import Mean, accuracy, cell, difference, header, methods_of, write_results
from scripts.study.study_runs import claim_folder, prepare, run_script
from scripts.study.study_task import DATA, file_name, tuning_file

SIZE = 50
"""Sequences of each data set that the preflight scores, as in the study on a pretrained model."""
NAMES = {"SFT": "sft", "DFT": "dft", "alpha 0.5": "dft, alpha 0.5"}
"""Names that the preflight gives to methods of the studies; the others have the same name in both."""
RESULTS = {"small": ROOT / "docs/study.json", "pretrained": ROOT / "docs/study_real.json"}
"""Results of the studies, by the name of the base model."""
OBJECTIVES_RESULTS = ROOT / "docs/objectives_study.json"
"""Results of all objectives with the small base model."""
LEARNED = {
    "right sums": "sums-three",
    "sums, 3 in 10 wrong": "sums-three",
    "differences": "differences-three",
    "half known": "short arithmetic",
    "half known, 3 in 10 wrong": "short arithmetic",
    "new": "spelling",
}
"""The problems that measure what a data set teaches."""


class Pair(NamedTuple):
    """Two methods on one data set.

    Attributes:
        difference: accuracy of the second method minus that of the first one, over the seeds, in points.
        foretold: score of the second method minus that of the first one.
    """

    data: str
    first: str
    second: str
    difference: Mean
    foretold: float

    @property
    def outcome(self) -> str:
        """ "hit", "miss", or "open" if the interval of the difference contains 0."""
        if abs(self.difference.value) <= self.difference.half:
            return "open"
        return "hit" if self.difference.value * self.foretold > 0 else "miss"


def foretell_small(folder: Path) -> dict[str, Any]:
    """Return the preflight's report on each data set of the study with a small model."""
    with ThreadPoolExecutor(1) as pool:
        study = Study(folder / "small", FULL, pool)
        study.train_base()
    return {
        name: preflight(study.base.path, study.data / tuning_file(name, 0), folder / file_name(name))
        for name in DATA
    }


def foretell_pretrained(folder: Path, model: Path) -> dict[str, Any]:
    """Return the preflight's report on each data set of the study with a pretrained model."""
    from scripts.study.real_settings import SIZES
    from scripts.study.real_tasks import DATA as REAL_DATA
    from scripts.study.real_tasks import data_file, write_data

    write_data(folder / "pretrained", SIZES["small"].rows, [0])
    return {
        name: preflight(
            model, data_file(folder / "pretrained", name, 0), folder / file_name(name), "--bf16", True
        )
        for name in REAL_DATA
    }


def preflight(model: Path, data: Path, output: Path, *more: object) -> dict[str, Any]:
    """Run the preflight on a file, unless the output has its report, and return what it says."""
    if not (output / "preflight.json").is_file():
        run_script(
            ROOT / "train_dft.py", "--preflight", True, "--preflight_samples", SIZE, "--use_cpu", True,
            "--model_name_or_path", model, "--data_files", data, "--output_dir", output, "--max_length", 512,
            "--data_cache_dir", output.parent / "cache", "--preprocessing_num_workers", 1, *more,
        )  # fmt: skip
    return trimmed(json.loads((output / "preflight.json").read_text())["objectives"])


def trimmed(value: Any) -> Any:
    """Return a report with four digits of each number."""
    if isinstance(value, dict):
        return {key: trimmed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [trimmed(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def name_of(method: str) -> str:
    """Return the name that the preflight gives to a method of the studies."""
    return NAMES.get(method, method)


def score_of(report: Mapping[str, Any], method: str) -> float:
    """Return the score of a method of the studies in the preflight's ranking."""
    return report["ranking"][name_of(method)]["score"]


def ranked_methods(report: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """Return the methods of a study, except those whose rank the preflight takes from another objective."""
    rows = report["ranking"]
    return [
        method for method in methods_of(results) if rows[name_of(method)].get("same_first_step_as") is None
    ]


def pairs_of(foretold: Mapping[str, Any], results: Mapping[str, Any]) -> list[Pair]:
    """Return all pairs of methods that a study compared and the preflight ranks, on each data set."""
    pairs = []
    for data, report in foretold.items():
        for first, second in combinations(ranked_methods(report, results), 2):
            measured = difference(results, first, second, data, LEARNED[data])
            foretold_difference = score_of(report, second) - score_of(report, first)
            pairs.append(Pair(data, first, second, measured, foretold_difference))
    return pairs


def tables(foretold: Mapping[str, Any]) -> str:
    """Return the tables of what was foretold, and of hits and misses in all studies."""
    parts = [overview_table(foretold), pair_tables(foretold)]
    return "\n".join(line for part in [*parts, objectives_tables(foretold["small"])] for line in [*part, ""])


def overview_table(foretold: Mapping[str, Any]) -> list[str]:
    """Return the table of what was foretold of each data set, and of the accuracies."""
    columns = ["mean p", "to try", "noise: SFT, alpha 0.5, DFT", "kept on p < 0.1: alpha 0.5, DFT"]
    lines = header("data", [*columns, "right, in percent"])
    for study, reports in foretold.items():
        results = json.loads(RESULTS[study].read_text())
        for data, report in reports.items():
            lines.append(f"| {data} | {' | '.join([*_summary(report), accuracies(results, data)])} |")
    return lines


def pair_tables(foretold: Mapping[str, Any]) -> list[str]:
    """Return the table of the pairs of methods that differ in the two studies with few methods."""
    pairs = [
        pair
        for study, reports in foretold.items()
        for pair in pairs_of(reports, json.loads(RESULTS[study].read_text()))
    ]
    decided = [pair for pair in pairs if pair.outcome != "open"]
    lines = header("data", ["methods", "measured difference", "difference of scores", "outcome"])
    for pair in decided:
        methods, measured = f"{pair.second} to {pair.first}", cell(pair.difference, "+")
        lines.append(f"| {pair.data} | {methods} | {measured} | {pair.foretold:+.2f} | {pair.outcome} |")
    hits = sum(pair.outcome == "hit" for pair in decided)
    return [
        *lines,
        "",
        f"Of {len(pairs)} pairs of methods, {len(decided)} differ significantly in accuracy on the task they "
        f"were trained on. The score orders {hits} of these as measured.",
    ]


def objectives_tables(foretold: Mapping[str, Any]) -> list[str]:
    """Return the tables of hits, and of misses, in the comparison of all objectives."""
    results = json.loads(OBJECTIVES_RESULTS.read_text())
    pairs = pairs_of(foretold, results)
    return [*hit_table(foretold, results, pairs), "", *miss_table(pairs)]


def hit_table(foretold: Mapping[str, Any], results: Mapping[str, Any], pairs: Sequence[Pair]) -> list[str]:
    """Return the table of hits by data set, with the accuracies of the recommended objectives."""
    lines = header("all objectives", ["pairs", "that differ", "hits", "to try: right, place", "best"])
    for data, report in foretold.items():
        outcomes = [pair.outcome for pair in pairs if pair.data == data]
        hits, misses = outcomes.count("hit"), outcomes.count("miss")
        right = {
            name_of(method): _mean_accuracy(results, method, data)
            for method in ranked_methods(report, results)
        }
        order = sorted(right, key=lambda name: -right[name])
        picks = ", ".join(
            f"{pick['name'].replace(', ', ' ')} {right[pick['name']]:.1f} ({order.index(pick['name']) + 1})"
            for pick in report["try"]
        )
        best = f"{order[0].replace(', ', ' ')} {right[order[0]]:.1f}"
        lines.append(f"| {data} | {len(outcomes)} | {hits + misses} | {hits} | {picks} | {best} |")
    return lines


def miss_table(pairs: Sequence[Pair]) -> list[str]:
    """Return the table of the pairs that the score orders otherwise than the measured accuracies."""
    lines = header("data", ["preferred by the score", "better by measurement", "points"])
    for pair in [pair for pair in pairs if pair.outcome == "miss"]:
        value, half = pair.difference
        better, other = (pair.second, pair.first) if value > 0 else (pair.first, pair.second)
        lines.append(f"| {pair.data} | {other} | {better} | {cell(Mean(abs(value), half))} |")
    return lines


def accuracies(results: Mapping[str, Any], data: str) -> str:
    """Return the accuracy of each method of a study on the task trained on, the best first."""
    means = {method: _mean_accuracy(results, method, data) for method in methods_of(results)}
    ordered = sorted(means, key=lambda method: -means[method])
    return ", ".join(f"{method} {means[method]:.1f}" for method in ordered)


def _mean_accuracy(results: Mapping[str, Any], method: str, data: str) -> float:
    return accuracy(results, method, data, LEARNED[data]).value


def _summary(report: Mapping[str, Any]) -> list[str]:
    rows, mixture = report["ranking"], "dft, alpha 0.5"
    noise = [rows[name]["noise"] for name in ("sft", mixture, "dft")]
    kept = [rows[name]["kept"]["low"] for name in (mixture, "dft")]
    picks = ", ".join(pick["name"].replace(", ", " ") for pick in report["try"])
    return [f"{report['mean_p']:.2f}", picks, _percents(noise), _percents(kept)]


def _percents(shares: Sequence[float | None]) -> str:
    return ", ".join("-" if share is None else f"{share:.0%}" for share in shares)


def main() -> None:
    """Run the preflights and write the tables."""
    report_user_errors()
    prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--model", type=Path, help="folder of the pretrained model of the second study")
    options = parser.parse_args()
    if options.model is not None and not (options.model / "config.json").is_file():
        raise UserError(f"--model: {options.model / 'config.json'} does not exist")
    quiet_libraries()
    folder = options.folder.resolve()
    with claim_folder(folder, {"foretelling": FULL._asdict()}):
        foretold = {"small": foretell_small(folder)}
        if options.model is not None:
            foretold["pretrained"] = foretell_pretrained(folder, options.model.resolve())
    write_results(foretold, folder, "foretelling", tables(foretold), {})


if __name__ == "__main__":
    main()
