"""Compare training objectives on a pretrained model, with problems that have verifiers.

    python scripts/get_model.py smollm2-135m models/smollm2
    python scripts/study/real_study.py runs/study_real --model models/smollm2 --gsm8k gsm8k.jsonl
    python scripts/study/real_study.py runs/quick --model models/smollm2 --size quick

The problems come from reasoning-gym. The model is fine-tuned with each objective on three data sets: short
arithmetic that it half knows; the same with three wrong answers in ten; and words spelled backward, which is
new to it. Each fine-tuned model answers held-out problems of all tasks, greedily, and is scored on texts
that it was not trained on (GSM8K, and the answers of the untouched model to 200 plain questions), to measure
what it forgot.

The learning rate of each method is selected on separate problems with a separate seed.

The script writes study.json, table.md and pictures. Results that are in the folder are not computed again, so
that an interrupted study continues with the same command. On the CPU two runs are processed at a time, on a
GPU one after the other.

needs: pip install -r requirements-real.txt
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError, report_user_errors
from dft.evaluation.folder import read_records
from dft.files import write_atomically
from dft.ranks import quiet_libraries
from scripts.study.real_results import write_results
from scripts.study.real_settings import MAX_NEW_TOKENS, METHODS, SIZES, Size
from scripts.study.real_tasks import (
    DATA,
    TASKS,
    data_file,
    held_out,
    is_right,
    task_file,
    validation,
    write_data,
    write_own_answers,
)
from scripts.study.study_runs import SELECTION_SEED, Run, claim_folder, prepare, read_result, run_script
from scripts.study.study_task import file_name


@dataclass
class Study:
    """The steps of a study in one folder.

    Attributes:
        folder: output folder.
        model: folder of the pretrained model.
        size: amount of data, number of seeds, and learning rates.
        gsm8k: file of GSM8K conversations to score, or None.
        workers: number of processes at a time.
    """

    folder: Path
    model: Path
    size: Size
    gsm8k: Path | None
    workers: int

    @property
    def data(self) -> Path:
        """Folder of the problems and conversations."""
        return self.folder / "data"

    @property
    def unrelated(self) -> list[Path]:
        """Files of texts that have nothing to do with the tasks."""
        return [self.data / "own-answers.jsonl", *([self.gsm8k] if self.gsm8k else [])]

    def prepare(self) -> None:
        """Write the data, and let the pretrained model answer the plain questions."""
        if not (self.data / "own-answers.jsonl").is_file():
            write_data(self.data, self.size.rows, range(SELECTION_SEED, self.size.seeds))
            questions = self.data / "plain-questions.jsonl"
            self.answer("base", self.model, [questions], self.folder / "plain", 96)
            write_own_answers(
                self.folder / "plain/base/plain-questions.jsonl", self.data / "own-answers.jsonl"
            )

    def answer(self, name: str, model: Path, files: Sequence[Path], output: Path, limit: int) -> None:
        """Let a model answer the problems of some files, with scripts/evaluate.py."""
        run_script(
            ROOT / "scripts/evaluate.py", "--model", f"{name}={model}", "--data", *files, "--output", output,
            "--samples", 1, "--temperature", 0, "--max_new_tokens", limit, "--batch_size", 100,
            "--grader", "exact", "--dtype", "bfloat16", "--backend", "transformers",
        )  # fmt: skip

    def score(self, model: Path, files: Sequence[Path], output: Path) -> dict[str, Any]:
        """Score texts with a model, and return the report of the preflight."""
        run_script(
            ROOT / "train_dft.py", "--preflight", True, "--preflight_samples", self.size.scored,
            "--model_name_or_path", model, "--data_files", *files, "--output_dir", output,
            "--per_device_train_batch_size", 16, *self.common_flags(),
        )  # fmt: skip
        return json.loads((output / "preflight.json").read_text())

    def common_flags(self) -> tuple[object, ...]:
        """Return the flags of every call of train_dft.py."""
        device = () if torch.cuda.is_available() else ("--use_cpu", True)
        return (
            "--max_length", 512, "--bf16", True, "--data_cache_dir", self.data / "cache", *device,
            "--preprocessing_num_workers", 1, "--enable_gradient_checkpointing", False,
        )  # fmt: skip

    def train(self, run: Run, output: Path) -> None:
        """Fine-tune the pretrained model, with four evaluations on validation problems on the way."""
        curve = task_file(self.data, "validation", DATA[run.data].learned)
        run_script(
            ROOT / "train_dft.py", "--model_name_or_path", self.model, "--output_dir", output,
            "--data_files", data_file(self.data, run.data, run.seed), "--seed", run.seed + 1,
            "--learning_rate", run.rate, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.1,
            "--num_train_epochs", 1, "--per_device_train_batch_size", 16, "--save_strategy", "no",
            "--verify_save", False, "--report", False, "--logging_steps", 5, "--overwrite_output_dir", True,
            *(("--eval_data_files", curve, "--eval_strategy", "steps", "--eval_steps", 0.25,
               "--eval_on_start", True, "--per_device_eval_batch_size", 50) if run.seed == 0 else ()),
            *self.common_flags(), *METHODS[run.method],
        )  # fmt: skip

    def result(self, run: Run) -> dict[str, Any]:
        """Fine-tune and test a model, and return its results. The weights are removed afterwards.

        Runs of the selection answer the validation problems of the task that they were trained on. The others
        answer the problems of all tasks and are scored.
        """
        folder = self.folder / "runs" / run.name
        file = folder / "result.json"
        if file.is_file():
            return read_result(file, *Run._fields, "right", "curve")
        if folder.exists():
            shutil.rmtree(folder)
        self.train(run, folder / "model")
        log = json.loads((folder / "model/trainer_state.json").read_text())["log_history"]
        kind = "validation" if run.seed == SELECTION_SEED else "test"
        tasks = [DATA[run.data].learned] if kind == "validation" else list(TASKS)
        result = {
            **run._asdict(),
            **self.test(run.name, folder / "model", kind, tasks, folder),
            "curve": [record for record in log if "eval_nll" in record],
        }
        shutil.rmtree(folder / "model")
        write_atomically(file, [json.dumps(result)])
        print(f"    {run.name:50} {result['right']}", flush=True)
        return result

    def test(self, name: str, model: Path, kind: str, tasks: Sequence[str], folder: Path) -> dict[str, Any]:
        """Return the answers of a model to problems, their grades, and its scores of other texts."""
        files = [task_file(self.data, kind, task) for task in tasks]
        self.answer(name, model, files, folder / "answers", MAX_NEW_TOKENS)
        answers, right, stopped = {}, {}, {}
        for task, file in zip(tasks, files, strict=True):
            chosen = held_out(task) if kind == "test" else validation(task)
            records = sorted(
                read_records(folder / "answers" / name / file.name), key=lambda record: record["line"]
            )
            samples = [record["samples"][0] for record in records]
            answers[task] = [sample["text"] for sample in samples]
            grades = [is_right(problem, text) for problem, text in zip(chosen, answers[task], strict=True)]
            right[task] = 100 * sum(grades) / len(grades)
            stopped[task] = 100 * sum(sample["stopped"] for sample in samples) / len(samples)
        result = {"right": right, "stopped": stopped}
        if kind == "test":
            report = self.score(model, [*files, *self.unrelated], folder / "scores")
            result |= {"answers": answers, "scores": report["files"]}
        return result

    def results(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Return the results of runs, processing several at a time."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.result, runs))

    def select_rates(self) -> list[dict[str, Any]]:
        """Return the results of each method with each learning rate, for the selection."""
        return self.results(
            [
                Run(method, data, SELECTION_SEED, rate)
                for group, data in groups().items()
                for method, rate in product(METHODS, self.size.rates[group])
            ]
        )

    def base_result(self) -> dict[str, Any]:
        """Test the pretrained model, and score the training data of each data set with it."""
        file = self.folder / "base.json"
        if not file.is_file():
            result = self.test("base", self.model, "test", list(TASKS), self.folder / "base")
            training = {
                name: self.score(
                    self.model, [data_file(self.data, name, 0)], self.folder / "preflight" / file_name(name)
                )
                for name in DATA
            }
            write_atomically(file, [json.dumps({**result, "training": training})])
        return read_result(file, "right", "scores", "training")


def selection_score(result: Mapping[str, Any]) -> float:
    """Return what methods and learning rates are selected by: the accuracy on the task trained on."""
    return result["right"][DATA[result["data"]].learned]


def select(results: Sequence[Mapping[str, Any]], data: str) -> dict[str, Mapping[str, Any]]:
    """Return the best result of each method on a data set; of equal ones that of the lowest rate."""
    best: dict[str, Mapping[str, Any]] = {}
    for result in sorted((result for result in results if result["data"] == data), key=lambda r: r["rate"]):
        method = result["method"]
        if method not in best or selection_score(result) > selection_score(best[method]):
            best[method] = result
    return best


def groups() -> dict[str, str]:
    """Return the data set that learning rates are selected on, by group of data sets."""
    first: dict[str, str] = {}
    for name, data in DATA.items():
        first.setdefault(data.group, name)
    return first


def run_study(study: Study) -> dict[str, Any]:
    """Run all steps of a study, and return the content of study.json."""
    size = study.size
    print("the pretrained model", flush=True)
    study.prepare()
    base = study.base_result()
    print("selecting the learning rate of each method", flush=True)
    trials = study.select_rates()
    best = {group: select(trials, data) for group, data in groups().items()}
    print("comparing the methods", flush=True)
    runs = [
        Run(method, name, seed, best[data.group][method]["rate"])
        for seed, (name, data), method in product(range(size.seeds), DATA.items(), METHODS)
    ]
    return {
        "size": asdict(size), "methods": list(METHODS), "base": base, "trials": trials,
        "runs": study.results(runs),
    }  # fmt: skip


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--model", type=Path, required=True, help="folder that scripts/get_model.py has made")
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="quick: almost no data, to test the script"
    )
    parser.add_argument("--gsm8k", type=Path, help="conversations of GSM8K, to measure what is forgotten")
    options = parser.parse_args()
    for path, flag in ((options.model / "config.json", "--model"), (options.gsm8k, "--gsm8k")):
        if path is not None and not path.is_file():
            raise UserError(f"{flag}: {path} does not exist")
    quiet_libraries()
    size, gsm8k = SIZES[options.size], options.gsm8k and str(options.gsm8k.resolve())
    description = {"size": asdict(size), "model": str(options.model.resolve()), "gsm8k": gsm8k}
    if not options.gsm8k:
        print("without --gsm8k, forgetting is measured on the answers to plain questions alone")
    gpu = torch.cuda.is_available()
    prepare(cpu=not gpu)
    study = Study(options.folder.resolve(), options.model.resolve(), size, options.gsm8k, 1 if gpu else 2)
    with claim_folder(options.folder, description):
        write_results(run_study(study), options.folder)
    if options.size == "quick":
        print("--size quick: these figures only show that every step ran")


if __name__ == "__main__":
    main()
