"""The tasks of the study on a pretrained model: problems of reasoning-gym as chat, and plain questions."""

import json
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from dft.errors import UserError, report_user_errors

try:
    import reasoning_gym
except ModuleNotFoundError:
    report_user_errors()  # this module is imported before the script that imports it can call this
    raise UserError(
        "the package reasoning-gym is missing; run: pip install -r requirements-real.txt"
    ) from None

from scripts.study.study_task import file_name, write_rows


class Part(NamedTuple):
    """A kind of problem.

    Attributes:
        generator: name of the generator in reasoning-gym.
        options: its options.
        draws: problems to generate; those that repeat a question are left out.
        held_out: problems for testing.
        validation: problems for selecting methods and learning rates.
        find: pattern of what may be an answer; the last match in a text is graded.
    """

    generator: str
    options: dict[str, int]
    draws: int
    held_out: int
    validation: int
    find: str


DIGITS = {"min_terms": 2, "max_terms": 2}
NUMBER, WORD = r"-?\d+", r"[A-Za-z]+"
PARTS = {
    "products": Part("products", {**DIGITS, "min_digits": 1, "max_digits": 1}, 3_000, 40, 20, NUMBER),
    "short sums": Part("chain_sum", {**DIGITS, "min_digits": 1, "max_digits": 1}, 6_000, 60, 40, NUMBER),
    "long sums": Part("chain_sum", {**DIGITS, "min_digits": 2, "max_digits": 2}, 3_000, 100, 50, NUMBER),
    "spelling": Part("spell_backward", {"min_word_len": 3, "max_word_len": 4}, 3_000, 100, 50, WORD),
}
"""There are only 100 products of two digits, and 200 sums and differences of two."""
TASKS = {
    "short arithmetic": ("products", "short sums"),
    "long sums": ("long sums",),
    "spelling": ("spelling",),
}
"""The parts of each file of problems."""


class Data(NamedTuple):
    """A data set to fine-tune on.

    Attributes:
        parts: the kinds of problems in it, to equal parts.
        wrong: share of the answers that are wrong.
        group: data sets of a group share their learning rates, which are selected on the first of them.
        learned: the task that its conversations are of.
        asked: the tasks that it is compared on.
    """

    parts: tuple[str, ...]
    wrong: float
    group: str
    learned: str
    asked: tuple[str, ...]


ARITHMETIC = ("products", "short sums")
DATA = {
    "half known": Data(ARITHMETIC, 0.0, "half known", "short arithmetic", ("short arithmetic", "long sums")),
    "half known, 3 in 10 wrong": Data(
        ARITHMETIC, 0.3, "half known", "short arithmetic", ("short arithmetic", "long sums")
    ),
    "new": Data(("spelling",), 0.0, "new", "spelling", ("spelling", "short arithmetic")),
}
COLUMNS = [(name, asked) for name, data in DATA.items() for asked in data.asked]
"""Pairs of a data set and a task: the columns of the tables."""
SLIPS = (-10, -2, -1, 1, 2, 10)
"""Errors, one of which is added to the right number to make a wrong answer."""


class Problem(NamedTuple):
    """A problem and its answer.

    Attributes:
        part: key of `PARTS`.
        question: the text of the problem.
        answer: the right answer.
        entry: the problem as reasoning-gym describes it, for its verifier.
    """

    part: str
    question: str
    answer: str
    entry: dict[str, Any]

    def written_out(self, answer: str | None = None) -> str:
        """Return the answer as training data have it: `6 * 7 = 42`, or a word letter by letter.

        Args:
            answer: another answer than the right one.
        """
        answer = self.answer if answer is None else answer
        if self.part == "spelling":
            return f"{' '.join(reversed(answer))}, backward {' '.join(answer)}: {answer}"
        return f"{self.entry['metadata']['expression']} = {answer}"


@cache
def problems(part: str) -> tuple[Problem, ...]:
    """Return the distinct problems of a kind in a random order, the same each time."""
    generator, options, draws, *_ = PARTS[part]
    dataset = reasoning_gym.create_dataset(generator, size=draws, seed=0, **options)
    entries = {entry["question"]: entry for entry in dataset}
    distinct = [
        Problem(part, question, entry["answer"], entry) for question, entry in sorted(entries.items())
    ]
    random.Random(f"problems {part}").shuffle(distinct)
    return tuple(distinct)


def held_out(task: str) -> list[Problem]:
    """Return the problems of a task that models are tested on."""
    return [problem for part in TASKS[task] for problem in problems(part)[: PARTS[part].held_out]]


def validation(task: str) -> list[Problem]:
    """Return the problems of a task that methods and learning rates are selected on."""
    ends = {part: PARTS[part].held_out + PARTS[part].validation for part in TASKS[task]}
    return [problem for part, end in ends.items() for problem in problems(part)[PARTS[part].held_out : end]]


def training_rows(data: Data, count: int, seed: str) -> list[dict[str, Any]]:
    """Return conversations to fine-tune on, drawn from the problems that are not asked.

    A problem is drawn again only when all of its kind have been drawn.

    Args:
        data: the data set.
        count: number of conversations.
        seed: what determines the draw and the wrong answers.
    """
    generator = random.Random(seed)
    drawn: list[Problem] = []
    share, remainder = divmod(count, len(data.parts))
    for index, part in enumerate(data.parts):
        pool = problems(part)[PARTS[part].held_out + PARTS[part].validation :]
        missing = share + (index < remainder)
        while missing:
            batch = generator.sample(pool, min(missing, len(pool)))
            drawn += batch
            missing -= len(batch)
    generator.shuffle(drawn)
    return [
        conversation(
            problem.question,
            problem.written_out(slip(problem, generator) if generator.random() < data.wrong else None),
        )
        for problem in drawn
    ]


def slip(problem: Problem, generator: random.Random) -> str:
    """Return a wrong answer to an arithmetic problem."""
    return str(int(problem.answer) + generator.choice(SLIPS))


def conversation(question: str, answer: str) -> dict[str, Any]:
    """Return a question and its answer as a row of training data."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def is_right(problem: Problem, text: str) -> bool:
    """Return whether the verifier of reasoning-gym accepts the last number or word of a text."""
    matches = re.findall(PARTS[problem.part].find, text.replace(",", ""))
    return bool(matches) and verifier(problem.part)(matches[-1], problem.entry) == 1.0


@cache
def verifier(part: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the function of reasoning-gym that scores an answer to a problem of a kind."""
    return reasoning_gym.get_score_answer_fn(PARTS[part].generator)


COUNTRIES = (
    "Austria Belgium Brazil Canada Chile China Cuba Denmark Egypt England Finland France Germany Greece "
    "Hungary India Iran Ireland Israel Italy Japan Kenya Mexico Morocco Norway Pakistan Peru Poland "
    "Portugal Romania Russia Spain Sweden Switzerland Thailand Turkey Ukraine Uruguay Venezuela Vietnam"
)
WORDS = (
    "ancient brave calm curious eager fragile generous gentle honest humble idle jealous keen lazy "
    "loyal lucky modest noble patient polite proud quiet rapid rare rough rude sharp shy silent simple "
    "sincere stubborn tender tiny vague vivid warm weary wise young"
)
THINGS = (
    "anchor apron axe basket bell blanket bottle bridge broom bucket button candle carpet chisel clock "
    "compass curtain drum fence fork funnel hammer helmet kettle ladder lamp lens magnet mirror needle "
    "oven pillow pump rope saddle scissors shovel spoon tent umbrella"
)
SUBJECTS = (
    "atoms bees bicycles bread camels clouds coffee computers coral deserts dolphins earthquakes "
    "eclipses fireflies forests glaciers glass gravity honey islands jazz lightning maps mountains "
    "music oceans owls paper penguins pianos planets poems rain rainbows rivers salt snow trains "
    "volcanoes whales"
)
PLAIN_QUESTIONS = [
    *(f"What is the capital of {country}?" for country in COUNTRIES.split()),
    *(f"What does the word {word} mean?" for word in WORDS.split()),
    *(
        f"What is {'an' if thing[0] in 'aeiou' else 'a'} {thing} used for?"
        for thing in THINGS.split()
        if thing != "scissors"
    ),
    "What are scissors used for?",
    *(f"Tell me one fact about {subject}." for subject in SUBJECTS.split()),
    *(f"Write one sentence about {subject}." for subject in SUBJECTS.split()),
]
"""200 questions that have nothing to do with the tasks, to measure what a model forgets."""


def data_file(folder: Path, data: str, seed: int) -> Path:
    """Return the file of a data set."""
    return folder / f"train-{file_name(data)}-{seed}.jsonl"


def task_file(folder: Path, kind: str, task: str) -> Path:
    """Return the file of the problems of a task; `kind` is "test" or "validation"."""
    return folder / f"{kind}-{file_name(task)}.jsonl"


def write_data(folder: Path, counts: Mapping[str, int], seeds: Sequence[int]) -> None:
    """Write all files of problems and conversations. They are the same each time.

    Args:
        folder: where to write them.
        counts: conversations in each data set of a group.
        seeds: seeds of the data sets.
    """
    for task in TASKS:
        for kind, chosen in (("test", held_out(task)), ("validation", validation(task))):
            write_rows(
                task_file(folder, kind, task),
                [conversation(problem.question, problem.written_out()) for problem in chosen],
            )
    for name, data in DATA.items():
        for seed in seeds:
            rows = training_rows(data, counts[data.group], f"{name} {seed}")
            write_rows(data_file(folder, name, seed), rows)
    questions = [conversation(question, "-") for question in PLAIN_QUESTIONS]
    write_rows(folder / "plain-questions.jsonl", questions)


def write_own_answers(answers: Path, file: Path) -> None:
    """Write the base model's answers to the plain questions as conversations.

    Answers that were cut at the limit of the length are left out: their end is not the model's.

    Args:
        answers: samples that scripts/evaluate.py has written.
        file: the file to write.

    Raises:
        UserError: none is left.
    """
    records = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
    finished = [
        conversation(record["question"], record["samples"][0]["text"].strip())
        for record in records
        if record["samples"][0]["stopped"]
    ]
    rows = [row for row in finished if row["messages"][1]["content"]]
    if not rows:
        raise UserError(
            f"{answers}: the pretrained model ended none of its answers to plain questions; choose a model "
            "that was trained to chat"
        )
    write_rows(file, rows)
