"""SFT against DFT on tasks small enough for a laptop: sums and differences worked out step by step.

    python scripts/study/study.py runs/study              # 22 minutes on two cores
    python scripts/study/study.py runs/quick --quick      # a minute, to see that it works; no figures

A base model learns sums of two to five numbers, well enough to be often right. From there it is fine-tuned by
SFT, DFT and alpha between them: on sums of three; on the same with a wrong step in three of ten; and on
differences, of which it has never seen one. It is asked the same lengths, and five numbers where fine-tuning
has shown three (out of distribution), and after differences sums once more. Answers are drawn at temperature
1 and graded by what follows `####`; problems that a model was trained on do not count. The learning rate of
each method is, for either task, the best of a few on problems of its own, before the comparison. Seeds draw
other data and another order each.

Writes study.json, table.md, accuracy.png and histograms.png. What is there already is not made again, so a
folder holds one study: another size is refused.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError, report_user_errors
from dft.ranks import quiet_libraries
from dft.report.pages.images import write_png
from scripts.study.study_results import ALPHAS, DIGEST, accuracy_figure, digest_of, histogram_figure, tables
from scripts.study.study_runs import command, prepare
from scripts.study.study_task import DATA, TASKS, Size, plain, questions, tuning_file, write_data, write_model

FULL = Size(
    pretraining=24_000,
    tuning={"sums": 1_600, "differences": 8_000},  # a new task takes more to learn
    asked=200,
    samples=8,
    seeds=5,
    rates={"sums": (3e-5, 1e-4, 3e-4, 1e-3), "differences": (1e-3, 3e-3, 1e-2)},
)
QUICK = Size(160, dict.fromkeys(TASKS, 64), 4, 2, 2, dict.fromkeys(TASKS, (1e-3,)))


class Run(NamedTuple):
    """A fine-tuning."""

    method: str
    data: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.method}-{plain(self.data)}-{self.seed}-{self.rate:g}".replace(" ", "_")


# ---- training and asking, as a user would ----


def train(model: Path, data: Path, output: Path, alpha: float, rate: float, seed: int, *more: object) -> None:
    if (output / "trainer_state.json").is_file():
        return
    command(
        ROOT / "train_dft.py", "--model_name_or_path", model, "--data_files", data, "--output_dir", output,
        "--dft_alpha", alpha, "--learning_rate", rate, "--seed", seed, "--lr_scheduler_type", "cosine",
        "--warmup_ratio", 0.1, "--per_device_train_batch_size", 32, "--max_length", 128, "--use_cpu", True,
        "--num_train_epochs", 1, "--save_strategy", "no", "--report", False, "--logging_steps", 25,
        "--overwrite_output_dir", True, "--preprocessing_num_workers", 1,
        "--data_cache_dir", data.parent / "cache",
        "--verify_save", False, *more,
    )  # fmt: skip


class Asked(NamedTuple):
    """Answers of a model to one file of problems.

    Attributes:
        right: avg@n over the problems that count, in percent.
        left_out: problems that do not, since the model was trained on them.
    """

    right: float
    left_out: int


class Model(NamedTuple):
    """Where a model is, and the files that it and its base were trained on."""

    path: Path
    trained_on: tuple[Path, ...]


def ask(
    models: Mapping[str, Model], files: Sequence[Path], output: Path, size: Size
) -> dict[str, dict[str, Asked]]:
    """What each model answers to each file, by the names of both."""
    if not models:
        return {}
    command(
        ROOT / "scripts/evaluate.py", "--model", *(f"{name}={one.path}" for name, one in models.items()),
        "--data", *files, "--output", output, "--samples", size.samples, "--temperature", 1.0,
        "--max_new_tokens", 64, "--batch_size", 400, "--grader", "hash",
    )  # fmt: skip
    return {
        name: {file.stem: unseen(output / name / file.name, file, one.trained_on) for file in files}
        for name, one in models.items()
    }


def unseen(answers: Path, problems: Path, trained_on: Sequence[Path]) -> Asked:
    """Grades of the problems that are in none of these files.

    Raises:
        UserError: there are none.
    """
    seen = {question for file in trained_on for question in questions(file)}
    asked = questions(problems)
    shares = [
        fmean(one["right"] for one in record["samples"])
        for record in map(json.loads, answers.read_text().splitlines())
        if asked[record["line"] - 1] not in seen
    ]
    if not shares:
        raise UserError(f"{problems}: all of its problems were trained on; ask others")
    return Asked(100 * fmean(shares), len(asked) - len(shares))


def halves(
    pool: ThreadPoolExecutor, models: dict[str, Model], files: Sequence[Path], output: Path, size: Size
) -> dict[str, dict[str, Asked]]:
    """`ask`, in two processes."""
    names = list(models)
    parts = [{name: models[name] for name in names[part::2]} for part in range(2)]
    tasks = [
        pool.submit(ask, one, files, Path(f"{output}-{number}"), size) for number, one in enumerate(parts)
    ]
    return {name: values for task in tasks for name, values in task.result().items()}


def claim(folder: Path, size: Size) -> None:
    """Notes of which size the study in a folder is.

    Raises:
        UserError: it is of another, and its models would be taken for those of this one.
    """
    note, wanted = folder / "size.json", json.dumps(size._asdict())
    if folder.is_dir() and any(folder.iterdir()) and not (note.is_file() and note.read_text() == wanted):
        raise UserError(f"{folder}: holds something else than a study of this size; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)


def study(folder: Path, size: Size) -> dict[str, Any]:
    """Everything, from the data to the numbers."""
    claim(folder, size)
    data, runs = folder / "data", folder / "runs"
    pretraining = data / "pretraining.jsonl"
    write_data(data, size)
    if not (folder / "untrained/config.json").is_file():
        write_model(folder / "untrained", pretraining)
    print("the base model", flush=True)
    base = folder / "base"
    train(folder / "untrained", pretraining, base, 0.0, 3e-3, 0)

    def model(run: Run) -> Model:
        return Model(runs / run.name, (pretraining, data / tuning_file(run.data, run.seed)))

    def tune(run: Run) -> None:
        held_out = data / f"{DATA[run.data].task}-three.jsonl"
        looked_at = ("--eval_data_files", held_out, "--eval_strategy", "epoch", "--eval_on_start", True)
        file = data / tuning_file(run.data, run.seed)
        train(base, file, runs / run.name, ALPHAS[run.method], run.rate, run.seed + 1, *looked_at)

    with ThreadPoolExecutor(2) as pool:
        print("the learning rate of each method", flush=True)
        accuracies: dict[Run, float] = {}
        for task, kind in (("sums", "right sums"), ("differences", "differences")):
            tried = [Run(method, kind, -1, rate) for method, rate in product(ALPHAS, size.rates[task])]
            list(pool.map(tune, tried))
            models = {run.name: model(run) for run in tried}
            name = f"{task}-validation"
            found = halves(pool, models, [data / f"{name}.jsonl"], folder / f"asked-{name}", size)
            accuracies |= {run: found[run.name][name].right for run in tried}
        best = best_rates(accuracies)
        print("the comparison", flush=True)
        compared = [
            Run(method, kind, seed, best[method, one.task])
            for method, (kind, one), seed in product(ALPHAS, DATA.items(), range(size.seeds))
        ]
        list(pool.map(tune, compared))
        asked: dict[str, dict[str, Asked]] = {"base": {}}
        for task in TASKS:
            kinds = [kind for kind, one in DATA.items() if one.task == task]
            files = dict.fromkeys(file for kind in kinds for file in DATA[kind].asked)
            models = {"base": Model(base, (pretraining,))}
            models |= {run.name: model(run) for run in compared if run.data in kinds}
            paths = [data / f"{file}.jsonl" for file in files]
            found = halves(pool, models, paths, folder / f"asked-{task}", size)
            asked["base"] |= found.pop("base")
            asked |= found
    return {
        "size": size._asdict(),
        "rates": [{**run._asdict(), "accuracy": value} for run, value in accuracies.items()],
        "base": {file: one.right for file, one in asked["base"].items()},
        "left_out": {
            file: max(found[file].left_out for found in asked.values() if file in found)
            for file in asked["base"]
        },
        "before": {run.data: histograms(runs / run.name)[0] for run in compared},
        "runs": [
            {
                **run._asdict(),
                "right": {file: one.right for file, one in asked[run.name].items()},
                "histogram": histograms(runs / run.name)[-1],
            }
            for run in compared
        ],
    }


def best_rates(accuracies: Mapping[Run, float]) -> dict[tuple[str, str], float]:
    """The learning rate with which a method was right most often, by method and task."""
    best: dict[tuple[str, str], Run] = {}
    for run, value in accuracies.items():
        key = run.method, DATA[run.data].task
        if key not in best or value > accuracies[best[key]]:
            best[key] = run
    return {key: run.rate for key, run in best.items()}


def histograms(run: Path) -> list[list[int]]:
    """Tokens of the held-out sums by p, before and after fine-tuning."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [one["eval_p_histogram"] for one in log if "eval_p_histogram" in one]


def main() -> None:
    report_user_errors()
    prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="next to no data, to see that it works")
    given = parser.parse_args()
    quiet_libraries()
    found = study(given.folder, QUICK if given.quick else FULL)
    (given.folder / "study.json").write_text(json.dumps(found) + "\n")
    (given.folder / "table.md").write_text(tables(found))
    write_png(accuracy_figure(found), given.folder / "accuracy.png", {DIGEST: digest_of(found)})
    write_png(histogram_figure(found), given.folder / "histograms.png", {DIGEST: digest_of(found)})
    print(tables(found))
    if given.quick:
        print("--quick: these figures mean nothing but that every step ran")


if __name__ == "__main__":
    main()
