"""Compare SFT and DFT on small tasks: sums and differences that are worked out step by step.

    python scripts/study/study.py runs/study              # half an hour to an hour on two cores
    python scripts/study/study.py runs/quick --quick      # one minute, to test the script

A base model is trained on sums of two to five numbers until it is often right. From there it is fine-tuned
with SFT, with DFT, and with an alpha between them, on three data sets: sums of three numbers; the same with a
wrong step in three of ten answers; and differences, which are new to it. Each model is then tested on
problems of three numbers, on longer problems of five numbers and, after differences, on sums again.

Answers are sampled at temperature 1 and graded by the text after `####`. Problems that a model was trained on
are left out. The learning rate of each method and task is selected beforehand, on separate problems.
Each seed has its own data in its own order. On partly wrong data the methods are also compared at all
learning rates, because a lower rate alone makes a model learn less from wrong answers.

The script writes study.json, table.md, accuracy.png and histograms.png. It reuses the results that are in the
folder already, so a folder holds one study; a study of a different size is rejected.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import report_user_errors
from dft.ranks import quiet_libraries
from scripts.study.study_answers import Model, Score, evaluate_in_parallel
from scripts.study.study_results import ALPHAS, accuracy_figure, histogram_figure, tables, write_results
from scripts.study.study_runs import SELECTION_SEED, Run, claim_folder, prepare, run_script
from scripts.study.study_task import (
    DATA,
    TASKS,
    WRONG,
    Size,
    tuning_file,
    write_data,
    write_model,
)

FULL = Size(
    pretraining=24_000,
    tuning={"sums": 1_600, "differences": 8_000},  # a new task needs more data
    asked=200,
    samples=8,
    seeds=5,
    rates={"sums": (3e-5, 1e-4, 3e-4, 1e-3), "differences": (1e-3, 3e-3, 1e-2)},
)
QUICK = Size(160, dict.fromkeys(TASKS, 64), 4, 2, 2, dict.fromkeys(TASKS, (1e-3,)))
METHODS: dict[str, Sequence[object]] = {name: ("--dft_alpha", alpha) for name, alpha in ALPHAS.items()}
"""The methods that are compared, and their flags of train_dft.py."""
SELECTION_DATA = {"sums": "right sums", "differences": "differences"}
"""The data set on which the learning rate of each task is selected."""


def train(model: Path, data: Path, output: Path, rate: float, seed: int, *more: object) -> None:
    """Train a model with train_dft.py, unless the output has a finished run.

    Args:
        more: further flags and their values, such as those of the objective.
    """
    if (output / "trainer_state.json").is_file():
        return
    run_script(
        ROOT / "train_dft.py", "--model_name_or_path", model, "--data_files", data, "--output_dir", output,
        "--learning_rate", rate, "--seed", seed, "--lr_scheduler_type", "cosine",
        "--warmup_ratio", 0.1, "--per_device_train_batch_size", 32, "--max_length", 128, "--use_cpu", True,
        "--num_train_epochs", 1, "--save_strategy", "no", "--report", False, "--logging_steps", 25,
        "--overwrite_output_dir", True, "--preprocessing_num_workers", 1,
        "--data_cache_dir", data.parent / "cache",
        "--verify_save", False, *more,
    )  # fmt: skip


class Study:
    """The steps of a study in one folder.

    Args:
        folder: output folder.
        size: amount of data, number of seeds, and learning rates.
        pool: runs two processes at a time.
        methods: the methods to compare, and their flags of train_dft.py.
    """

    def __init__(
        self,
        folder: Path,
        size: Size,
        pool: ThreadPoolExecutor,
        methods: Mapping[str, Sequence[object]] = METHODS,
    ) -> None:
        self.folder, self.size, self.pool, self.methods = folder, size, pool, methods
        self.data, self.runs = folder / "data", folder / "runs"
        self.base = Model(folder / "base", (self.data / "pretraining.jsonl",))

    def train_base(self) -> None:
        """Write the data, and train the base model."""
        pretraining = self.base.trained_on[0]
        write_data(self.data, self.size)
        if not (self.folder / "untrained/config.json").is_file():
            write_model(self.folder / "untrained", pretraining)
        train(self.folder / "untrained", pretraining, self.base.path, 3e-3, 0, "--dft_alpha", 0)

    def model_of(self, run: Run) -> Model:
        """Return the model of a fine-tuning run."""
        files = (*self.base.trained_on, self.data / tuning_file(run.data, run.seed))
        return Model(self.runs / run.name, files)

    def fine_tune(self, runs: Sequence[Run]) -> dict[str, Model]:
        """Fine-tune the base model, and return the models by the names of the runs."""
        list(self.pool.map(self._fine_tune, runs))
        return {run.name: self.model_of(run) for run in runs}

    def _fine_tune(self, run: Run) -> None:
        held_out = self.data / f"{DATA[run.data].task}-three.jsonl"
        evaluation = ("--eval_data_files", held_out, "--eval_strategy", "epoch", "--eval_on_start", True)
        data = self.data / tuning_file(run.data, run.seed)
        flags = (*self.methods[run.method], *evaluation)
        train(self.base.path, data, self.runs / run.name, run.rate, run.seed + 1, *flags)

    def select_rates(self) -> dict[Run, float]:
        """Return the accuracy of each method with each learning rate, on the validation problems."""
        return self.validate(
            Run(method, data, SELECTION_SEED, rate)
            for task, data in SELECTION_DATA.items()
            for method, rate in product(self.methods, self.size.rates[task])
        )

    def validate(self, runs: Iterable[Run], step: str = "") -> dict[Run, float]:
        """Fine-tune, and return the accuracy of each run on the validation problems of its task.

        Args:
            runs: what to train.
            step: suffix of the folders of answers, different for each call.
        """
        runs = list(runs)
        models, accuracies = self.fine_tune(runs), {}
        for task in TASKS:
            name = f"{task}-validation"
            of_task = [run for run in runs if DATA[run.data].task == task]
            to_ask = {run.name: models[run.name] for run in of_task}
            files, output = [self.data / f"{name}.jsonl"], self.folder / f"asked-{name}{step}"
            scores = evaluate_in_parallel(self.pool, to_ask, files, output, self.size)
            accuracies |= {run: scores[run.name][name].right for run in of_task}
        return accuracies

    def runs_at(self, rates: Mapping[tuple[str, str], float]) -> list[Run]:
        """Return the runs to compare: each method on each data set and seed, with the rate for its task."""
        return [
            Run(method, name, seed, rates[method, data.task])
            for method, (name, data), seed in product(self.methods, DATA.items(), range(self.size.seeds))
        ]

    def test(self, runs: Sequence[Run]) -> dict[str, dict[str, Score]]:
        """Fine-tune, and return the scores of the base model ("base") and of each run by its name."""
        self.fine_tune(runs)
        scores: dict[str, dict[str, Score]] = {"base": {}}
        for task in TASKS:
            names = [name for name, data in DATA.items() if data.task == task]
            files = dict.fromkeys(file for name in names for file in DATA[name].asked)
            models = {"base": self.base}
            models |= {run.name: self.model_of(run) for run in runs if run.data in names}
            paths = [self.data / f"{file}.jsonl" for file in files]
            output = self.folder / f"asked-{task}"
            of_task = evaluate_in_parallel(self.pool, models, paths, output, self.size)
            scores["base"] |= of_task.pop("base")
            scores |= of_task
        return scores

    def test_on_wrong_data(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Fine-tune on partly wrong data with other learning rates than the selected ones.

        Args:
            runs: runs on the data set `WRONG`.

        Returns:
            The runs with their scores, as in the `runs` of study.json.
        """
        models = self.fine_tune(runs)
        files = [self.data / f"{file}.jsonl" for file in DATA[WRONG].asked]
        output = self.folder / "asked-at-other-rates"
        scores = evaluate_in_parallel(self.pool, models, files, output, self.size)
        return [
            {**run._asdict(), "right": {file: score.right for file, score in scores[run.name].items()}}
            for run in runs
        ]


def run_study(folder: Path, size: Size) -> dict[str, Any]:
    """Run all steps of a study, and return the content of study.json."""
    with claim_folder(folder, size._asdict()), ThreadPoolExecutor(2) as pool:
        study = Study(folder, size, pool)
        print("training the base model", flush=True)
        study.train_base()
        print("selecting the learning rate of each method", flush=True)
        accuracies = study.select_rates()
        best = best_rates(accuracies)
        print("comparing the methods", flush=True)
        runs = study.runs_at(best)
        scores = study.test(runs)
        print("partly wrong data with the other learning rates", flush=True)
        others = [run for run in wrong_at_all_rates(size) if run not in runs]
        at_other_rates = study.test_on_wrong_data(others)
    return outcome(study, accuracies, runs, scores, at_other_rates)


def wrong_at_all_rates(size: Size) -> list[Run]:
    """Return the runs on partly wrong data with each method, learning rate and seed."""
    rates = size.rates[DATA[WRONG].task]
    return [
        Run(method, WRONG, seed, rate) for method, rate, seed in product(METHODS, rates, range(size.seeds))
    ]


def outcome(
    study: Study,
    accuracies: Mapping[Run, float],
    runs: Sequence[Run],
    scores: Mapping[str, Mapping[str, Score]],
    at_other_rates: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the content of study.json: the scores of all models, with their histograms of p.

    Args:
        study: the study that has fine-tuned the models.
        accuracies: what `Study.select_rates` returned.
        runs: the runs that are compared.
        scores: what `Study.test` returned for them.
        at_other_rates: what `Study.test_on_wrong_data` returned.
    """
    return {
        "size": study.size._asdict(),
        "rates": [{**run._asdict(), "accuracy": value} for run, value in accuracies.items()],
        "base": {file: score.right for file, score in scores["base"].items()},
        "left_out": {
            file: max(of_model[file].left_out for of_model in scores.values() if file in of_model)
            for file in scores["base"]
        },
        "before": {run.data: histograms(study.runs / run.name)[0] for run in runs},
        "runs": [
            {
                **run._asdict(),
                "right": {file: score.right for file, score in scores[run.name].items()},
                "histogram": histograms(study.runs / run.name)[-1],
            }
            for run in runs
        ],
        "at_other_rates": at_other_rates,
    }


def best_rates(accuracies: Mapping[Run, float]) -> dict[tuple[str, str], float]:
    """Return the learning rate with the highest accuracy, by method and task."""
    best: dict[tuple[str, str], Run] = {}
    for run, value in accuracies.items():
        key = run.method, DATA[run.data].task
        if key not in best or value > accuracies[best[key]]:
            best[key] = run
    return {key: run.rate for key, run in best.items()}


def histograms(run: Path) -> list[list[int]]:
    """Return the histograms of p on held-out problems, before and after fine-tuning."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [record["eval_p_histogram"] for record in log if "eval_p_histogram" in record]


def main() -> None:
    report_user_errors()
    prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="almost no data, to test the script")
    options = parser.parse_args()
    quiet_libraries()
    results = run_study(options.folder, QUICK if options.quick else FULL)
    figures = {"accuracy": accuracy_figure(results), "histograms": histogram_figure(results)}
    write_results(results, options.folder, "study", tables(results), figures)
    if options.quick:
        print("--quick: these figures only show that every step ran")


if __name__ == "__main__":
    main()
