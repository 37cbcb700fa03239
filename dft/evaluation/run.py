"""Models times files: samples are kept line by line, and an interrupted evaluation goes on."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product, takewhile
from pathlib import Path

from tqdm import tqdm

from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.evaluation.folder import Note, Record, whole_lines
from dft.evaluation.grading import grade, suited, wanted_answer
from dft.evaluation.problems import Problem
from dft.evaluation.sampling import Sampler, Settings
from dft.files import write_atomically

VLLM_PROBLEMS = 64
"""Given to vLLM at once, which makes its own batches of them."""
WORDS = {
    "boxed": r"by \boxed{}", "hash": "by ####", "exact": "as exact text",
    "answer": r"by #### or \boxed{}, whichever is there",
}  # fmt: skip
"""How a grader grades."""


def check_references(problems: Sequence[Problem], grader: str) -> str:
    """How the references of a file are graded, in words.

    Raises:
        UserError: one has not what the grader looks for.
    """
    found: Counter[str] = Counter()
    for one in problems:
        used = suited(one.reference, one.has_answer) if grader == "auto" else grader
        try:
            wanted_answer(one.reference, used, one.has_answer)
        except UserError as error:
            raise UserError(f"--data {one.file}:{one.line}: {error}") from None
        found[used] += 1
    return ", ".join(f"{count:,} {WORDS[used]}" for used, count in sorted(found.items()))


def graded(record: Record, grader: str) -> Record:
    """A record with grades, which are of its texts alone."""
    reference, has_answer = record["reference"], record["has_answer"]
    samples = [
        {**one, "right": grade(reference, one["text"], grader, has_answer)} for one in record["samples"]
    ]
    return {**record, "grader": grader, "samples": samples}


def regrade(folder: Path, note: Note, grader: str) -> None:
    """Grades what is kept in a folder anew where another grader has. Nothing is sampled.

    Raises:
        UserError: a reference has not what the grader looks for.
    """
    for model, data in product(note["models"], note["data"]):
        file = folder / model / f"{data}.jsonl"
        records = whole_lines(file)
        if all(one["grader"] == grader for one in records):
            continue
        made = []
        for record in tqdm(records, desc=f"grading {model}, {data}", disable=None, unit="problem"):
            try:
                made.append(graded(record, grader))
            except UserError as error:
                raise UserError(f"{file}:{len(made) + 1}: {error}") from None
        write_atomically(file, (json.dumps(one) + "\n" for one in made))


def sample(
    file: Path,
    problems: Sequence[Problem],
    make_sampler: Callable[[], tuple[Sampler, ChatEncoder]],
    settings: Settings,
    grader: str,
    together: int,
    label: str,
) -> None:
    """Makes the records of one model on one file that are not there yet.

    Problems are sampled some at a time, with a seed of the first of them, so that an evaluation that was
    interrupted ends with what it would have had. What is left of an unfinished group is made anew.

    Args:
        file: where they are kept, a line for each problem.
        make_sampler: called if anything is left to do.
        together: problems at a time.
    """
    kept = [
        record
        for record, _ in takewhile(
            lambda pair: pair[0]["line"] == pair[1].line and len(pair[0]["samples"]) == settings.samples,
            zip(whole_lines(file), problems, strict=False),
        )
    ]
    if len(kept) == len(problems):
        return
    kept = kept[: len(kept) - len(kept) % together]
    sampler, encoder = make_sampler()
    prompts = [one.prompt_ids(encoder) for one in problems]
    write_atomically(file, (json.dumps(one) + "\n" for one in kept))
    bar = tqdm(total=len(problems), initial=len(kept), desc=label, disable=None, unit="problem")
    with open(file, "a", encoding="utf-8") as stream, bar:
        for start in range(len(kept), len(problems), together):
            some = problems[start : start + together]
            seed = settings.seed * 1_000_003 + start * settings.samples
            answers = sampler.sample(prompts[start : start + together], seed)
            for problem, drawn in zip(some, answers, strict=True):
                record = {
                    "line": problem.line,
                    "question": problem.question,
                    "reference": problem.reference,
                    "has_answer": problem.has_answer,
                    "samples": [asdict(one) for one in drawn],
                }
                stream.write(json.dumps(graded(record, grader)) + "\n")
            stream.flush()
            bar.update(len(some))
