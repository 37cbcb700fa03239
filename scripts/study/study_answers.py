"""Let models of the study answer problems, and score the answers to those that they were not trained on."""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError
from scripts.study.study_runs import run_script
from scripts.study.study_task import Size, questions


class Score(NamedTuple):
    """The result of a model on one file of problems.

    Attributes:
        right: avg@n in percent over the counted problems.
        left_out: number of problems that are not counted because the model was trained on them.
    """

    right: float
    left_out: int


class Model(NamedTuple):
    """A trained model.

    Attributes:
        path: its folder.
        trained_on: the files that it and its base model were trained on.
    """

    path: Path
    trained_on: tuple[Path, ...]


def evaluate(
    models: Mapping[str, Model], files: Sequence[Path], output: Path, size: Size
) -> dict[str, dict[str, Score]]:
    """Test models with scripts/evaluate.py.

    Returns:
        The score of each model on each file, by the name of the model and the stem of the file.
    """
    if not models:
        return {}
    run_script(
        ROOT / "scripts/evaluate.py", "--model", *(f"{name}={model.path}" for name, model in models.items()),
        "--data", *files, "--output", output, "--samples", size.samples, "--temperature", 1.0,
        "--max_new_tokens", 64, "--batch_size", 400, "--grader", "hash",
    )  # fmt: skip
    return {
        name: {file.stem: score_unseen(output / name / file.name, file, model.trained_on) for file in files}
        for name, model in models.items()
    }


def score_unseen(answers: Path, problems: Path, trained_on: Sequence[Path]) -> Score:
    """Score the answers to the problems that are in none of the training files.

    Args:
        answers: graded answers, as scripts/evaluate.py writes them.
        problems: the file of the problems.
        trained_on: the training files.

    Raises:
        UserError: all problems are in the training files.
    """
    seen = {question for file in trained_on for question in questions(file)}
    asked = questions(problems)
    shares = [
        fmean(sample["right"] for sample in record["samples"])
        for record in map(json.loads, answers.read_text().splitlines())
        if asked[record["line"] - 1] not in seen
    ]
    if not shares:
        raise UserError(f"{problems}: the models were trained on all of its problems; use others")
    return Score(100 * fmean(shares), len(asked) - len(shares))


def evaluate_in_parallel(
    pool: ThreadPoolExecutor, models: dict[str, Model], files: Sequence[Path], output: Path, size: Size
) -> dict[str, dict[str, Score]]:
    """Call `evaluate` in two processes, each with half of the models."""
    names = list(models)
    parts = [{name: models[name] for name in names[part::2]} for part in range(2)]
    tasks = [
        pool.submit(evaluate, part, files, Path(f"{output}-{number}"), size)
        for number, part in enumerate(parts)
    ]
    return {name: scores for task in tasks for name, scores in task.result().items()}
