r"""Data of the paper's main experiment: NuminaMath-CoT, 100,000 drawn, and five benchmarks of mathematics.

    python scripts/paper/prepare.py runs/paper/data                        # from the hub
    python scripts/paper/prepare.py runs/paper/data --train numina.parquet --math500 math500.jsonl ...

Each source is a dataset of the hub (owner/name:split), or a local .jsonl, .json or .parquet file. Rows to
train on become ChatML conversations of a problem and its solution; benchmarks get a problem and its answer.

A system turn is left out: the chat template of Qwen2.5-Math writes one of its own ("Please reason step by
step, and put your final answer within \boxed{}."). For models whose template has none give it by --system.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from datasets import Dataset, load_dataset

from dft.errors import UserError, report_user_errors
from dft.evaluation.grading import last_boxed
from dft.files import convert_write_errors

TRAIN = "AI-MO/NuminaMath-CoT:train"
BENCHMARKS = {
    "math500": "HuggingFaceH4/MATH-500:test",
    "minerva": "math-ai/minervamath:test",
    "olympiad": "math-ai/olympiadbench:test",
    "aime24": "math-ai/aime24:test",
    "amc23": "math-ai/amc23:test",
}
DRAWN = 100_000
"""Of about 860,000, as in the paper (section 4.1.1)."""
QUESTIONS = ("problem", "question")
ANSWERS = ("answer", "final_answer")
SOLUTIONS = ("solution",)
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def rows_of(source: str) -> Dataset:
    """Raises `UserError` for a source that cannot be loaded."""
    file = Path(source).expanduser()
    try:
        if file.suffix in BUILDERS:
            return load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train")
        name, _, split = source.partition(":")
        return load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: cannot be loaded: {' '.join(str(error).split())}; name a dataset of the hub as "
            "owner/name:split, or a local .jsonl, .json or .parquet file"
        ) from None


def column(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of some columns that has a value; None where none has."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), None)


def system_turn(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def as_turn(turn: Any, where: str) -> dict[str, str]:
    """A turn with nothing but its role and content; raises `UserError` where it has not both."""
    given = turn if isinstance(turn, Mapping) else {}
    if not all(isinstance(given.get(name), str) for name in ("role", "content")):
        raise UserError(
            f"{where}: a turn of its messages is {str(turn)[:60]}; expected texts as role and content: name "
            "them so, or leave messages out and give problem and solution"
        )
    return {"role": given["role"], "content": given["content"]}


def conversation(row: Mapping[str, Any], where: str, system: str | None) -> dict[str, Any]:
    """A row of NuminaMath-CoT as a conversation: its `messages`, or `problem` and `solution`."""
    messages = row.get("messages")
    if messages:
        turns = [as_turn(turn, where) for turn in (messages if isinstance(messages, list) else [messages])]
    else:
        problem, solution = column(row, QUESTIONS), column(row, SOLUTIONS)
        if problem is None or solution is None:
            raise UserError(
                f"{where}: it has the columns {', '.join(row)}; expected messages, or "
                f"{' or '.join(QUESTIONS)} with {SOLUTIONS[0]}"
            )
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"messages": [*system_turn(system), *turns]}


def problem(row: Mapping[str, Any], where: str, system: str | None) -> dict[str, Any]:
    """A row of a benchmark with its answer, which may stand in a box of its solution."""
    question, answer = column(row, QUESTIONS), column(row, ANSWERS)
    if isinstance(answer, list):  # OlympiadBench: all of its answers, mostly one
        answer = ", ".join(map(str, answer))
    if answer is None:
        answer = last_boxed(str(column(row, SOLUTIONS) or ""))
    elif (inside := last_boxed(str(answer))) is not None:
        answer = inside
    if question is None or answer is None:
        raise UserError(
            f"{where}: it has the columns {', '.join(row)}; expected {' or '.join(QUESTIONS)} with "
            f"{' or '.join(ANSWERS)}, or a {SOLUTIONS[0]} with a boxed answer"
        )
    turns = [*system_turn(system), {"role": "user", "content": question}]
    # Dollar signs set mathematics, wherever in the answer it stands; an escaped one is money.
    return {"messages": turns, "answer": re.sub(r"(?<!\\)\$", "", str(answer)).strip()}


def drawn(rows: Dataset, count: int, seed: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """So many rows with their numbers, from 1, without repetition; in the order of the dataset."""
    for index in sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))):
        yield index + 1, rows[index]


def write(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with open(file, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl and the benchmarks are written")
    parser.add_argument("--train", default=TRAIN, metavar="SOURCE")
    for name, source in BENCHMARKS.items():
        parser.add_argument(f"--{name}", default=source, metavar="SOURCE")
    parser.add_argument("--count", type=int, default=DRAWN, help="conversations to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", help="a system turn for models whose chat template brings none")
    given = parser.parse_args()
    if given.count < 1:
        raise UserError(f"--count {given.count}: must be at least 1")
    with convert_write_errors(given.folder, "folder"):
        given.folder.mkdir(parents=True, exist_ok=True)
        file = given.folder / "train.jsonl"
        chosen = drawn(rows_of(given.train), given.count, given.seed)
        made = (conversation(row, f"{given.train}, row {number}", given.system) for number, row in chosen)
        print(f"{file}: {write(file, made):,} conversations")
        for name in BENCHMARKS:
            source = vars(given)[name]
            file = given.folder / f"{name}.jsonl"
            rows = enumerate(rows_of(source), 1)
            count = write(
                file, (problem(row, f"{source}, row {number}", given.system) for number, row in rows)
            )
            print(f"{file}: {count:,} problems")


if __name__ == "__main__":
    main()
