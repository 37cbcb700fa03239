"""Sample and grade the answers of one model to one data file, resuming an interrupted evaluation."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product, takewhile
from pathlib import Path

from tqdm import tqdm

from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.evaluation.folder import Manifest, SampleRecord, read_records
from dft.evaluation.grading import grade, reference_answer, resolve_grader
from dft.evaluation.problems import Problem
from dft.evaluation.sampling import Answer, Sampler, SamplingSettings
from dft.files import write_atomically

VLLM_PROBLEMS = 64
"""Number of problems to pass to vLLM at once. It forms its own batches of them."""
GRADERS_IN_WORDS = {
    "boxed": r"by \boxed{}", "hash": "by ####", "number": "by the last number", "exact": "as exact text",
    "answer": r"by #### or \boxed{}, whichever is there",
}  # fmt: skip


def describe_grading(problems: Sequence[Problem], grader: str) -> str:
    """Describe how many references each grader grades.

    Raises:
        UserError: a reference does not contain what the grader looks for.
    """
    counts: Counter[str] = Counter()
    for problem in problems:
        name = resolve_grader(problem.reference, problem.has_answer) if grader == "auto" else grader
        try:
            reference_answer(problem.reference, name, problem.has_answer)
        except UserError as error:
            raise UserError(f"--data {problem.file}:{problem.line}: {error}") from None
        counts[name] += 1
    return ", ".join(f"{count:,} {GRADERS_IN_WORDS[name]}" for name, count in sorted(counts.items()))


def grade_record(record: SampleRecord, grader: str) -> SampleRecord:
    """Return a record with its samples graded. Grades depend only on the texts."""
    reference, has_answer = record["reference"], record["has_answer"]
    samples = [
        {**sample, "right": grade(reference, sample["text"], grader, has_answer)}
        for sample in record["samples"]
    ]
    return {**record, "grader": grader, "samples": samples}


def regrade(folder: Path, manifest: Manifest, grader: str) -> None:
    """Regrade the saved samples of a folder if they were graded by a different grader.

    Raises:
        UserError: a reference does not contain what the grader looks for.
    """
    for model, data in product(manifest["models"], manifest["data"]):
        file = folder / model / f"{data}.jsonl"
        records = read_records(file)
        if all(record["grader"] == grader for record in records):
            continue
        graded = []
        for record in tqdm(records, desc=f"grading {model}, {data}", disable=None, unit="problem"):
            try:
                graded.append(grade_record(record, grader))
            except UserError as error:
                raise UserError(f"{file}:{len(graded) + 1}: {error}") from None
        write_atomically(file, (json.dumps(record) + "\n" for record in graded))


def sample_problems(
    file: Path,
    problems: Sequence[Problem],
    make_sampler: Callable[[], tuple[Sampler, ChatEncoder]],
    settings: SamplingSettings,
    grader: str,
    group_size: int,
    label: str,
) -> None:
    """Sample and grade the answers of one model to one data file, except those that are saved already.

    Problems are sampled in groups, each with its own seed, so that an interrupted and resumed evaluation has
    the same results as an uninterrupted one. An incomplete group is sampled again from its start.

    Args:
        file: the file of samples, a line for each problem.
        problems: the problems of the data file.
        make_sampler: returns the sampler and the encoder. Called only if some samples are missing.
        settings: how answers are drawn.
        grader: name of the grader.
        group_size: number of problems to sample at once.
        label: label of the progress bar.
    """
    saved = _matching_records(file, problems, settings)
    if len(saved) == len(problems):
        return
    saved = saved[: len(saved) - len(saved) % group_size]
    sampler, encoder = make_sampler()
    prompts = [problem.prompt_ids(encoder) for problem in problems]
    write_atomically(file, (json.dumps(record) + "\n" for record in saved))
    bar = tqdm(total=len(problems), initial=len(saved), desc=label, disable=None, unit="problem")
    with open(file, "a", encoding="utf-8") as stream, bar:
        for start in range(len(saved), len(problems), group_size):
            group = problems[start : start + group_size]
            seed = settings.seed * 1_000_003 + start * settings.samples
            answers = sampler.sample(prompts[start : start + group_size], seed)
            for problem, samples in zip(group, answers, strict=True):
                record = grade_record(_new_record(problem, samples), grader)
                stream.write(json.dumps(record) + "\n")
            stream.flush()
            bar.update(len(group))


def _matching_records(
    file: Path, problems: Sequence[Problem], settings: SamplingSettings
) -> list[SampleRecord]:
    """Return the saved records of the leading problems, up to the first one that does not match."""
    pairs = takewhile(
        lambda pair: pair[0]["line"] == pair[1].line and len(pair[0]["samples"]) == settings.samples,
        zip(read_records(file), problems, strict=False),
    )
    return [record for record, _ in pairs]


def _new_record(problem: Problem, samples: Sequence[Answer]) -> SampleRecord:
    return {
        "line": problem.line,
        "question": problem.question,
        "reference": problem.reference,
        "has_answer": problem.has_answer,
        "samples": [asdict(sample) for sample in samples],
    }
