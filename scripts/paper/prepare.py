r"""Prepare the data of the paper's main experiment: 100,000 rows of NuminaMath-CoT and five math benchmarks.

    python scripts/paper/prepare.py runs/paper/data                        # from the hub
    python scripts/paper/prepare.py runs/paper/data --train numina.parquet --math500 math500.jsonl ...

Each source is a dataset of the Hugging Face Hub (owner/name:split) or a local .jsonl, .json or .parquet file.
Training rows become ChatML conversations of a problem and its solution, benchmark rows a problem and its
answer.

By default there is no system turn, because the chat template of Qwen2.5-Math adds its own ("Please reason
step by step, and put your final answer within \boxed{}."). Use --system for models whose template adds none.
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
SAMPLED_ROWS = 100_000
"""Number of training rows out of about 860,000, as in the paper (section 4.1.1)."""
QUESTION_COLUMNS = ("problem", "question")
ANSWER_COLUMNS = ("answer", "final_answer")
SOLUTION_COLUMNS = ("solution",)
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_rows(source: str) -> Dataset:
    """Load the rows of a local file or of a dataset of the hub.

    Raises:
        UserError: the source cannot be loaded.
    """
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


def first_value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first non-empty value among several columns; None if all are empty."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), None)


def system_turns(system: str | None) -> list[dict[str, str]]:
    """Return a list with the system turn; empty if there is none."""
    return [{"role": "system", "content": system}] if system else []


def parse_turn(turn: Any, origin: str) -> dict[str, str]:
    """Return the role and content of a turn, without its other fields.

    Raises:
        UserError: one of them is missing or not a string.
    """
    fields = turn if isinstance(turn, Mapping) else {}
    if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
        raise UserError(
            f"{origin}: a turn of its messages is {str(turn)[:60]}; expected the strings role and content: "
            "rename the fields, or provide problem and solution instead of messages"
        )
    return {"role": fields["role"], "content": fields["content"]}


def conversation(row: Mapping[str, Any], origin: str, system: str | None) -> dict[str, Any]:
    """Return a row of NuminaMath-CoT as a conversation.

    Args:
        row: a row with `messages`, or with `problem` and `solution`.
        origin: source and number of the row, for messages.
        system: content of a system turn to add.

    Raises:
        UserError: the row has neither.
    """
    messages = row.get("messages")
    if messages:
        turns = [
            parse_turn(turn, origin) for turn in (messages if isinstance(messages, list) else [messages])
        ]
    else:
        problem, solution = first_value(row, QUESTION_COLUMNS), first_value(row, SOLUTION_COLUMNS)
        if problem is None or solution is None:
            raise UserError(
                f"{origin}: it has the columns {', '.join(row)}; expected messages, or "
                f"{' or '.join(QUESTION_COLUMNS)} with {SOLUTION_COLUMNS[0]}"
            )
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"messages": [*system_turns(system), *turns]}


def problem(row: Mapping[str, Any], origin: str, system: str | None) -> dict[str, Any]:
    """Return a row of a benchmark as a problem with its answer, which may be in a box of the solution.

    Args:
        row: a row with a column of `QUESTION_COLUMNS`, and one of `ANSWER_COLUMNS` or `SOLUTION_COLUMNS`.
        origin: source and number of the row, for messages.
        system: content of a system turn to add.

    Raises:
        UserError: the row has no question or no answer.
    """
    question, answer = first_value(row, QUESTION_COLUMNS), first_value(row, ANSWER_COLUMNS)
    if isinstance(answer, list):  # OlympiadBench lists all answers, usually one
        answer = ", ".join(map(str, answer))
    if answer is None:
        answer = last_boxed(str(first_value(row, SOLUTION_COLUMNS) or ""))
    elif (inside := last_boxed(str(answer))) is not None:
        answer = inside
    if question is None or answer is None:
        raise UserError(
            f"{origin}: it has the columns {', '.join(row)}; expected {' or '.join(QUESTION_COLUMNS)} with "
            f"{' or '.join(ANSWER_COLUMNS)}, or a {SOLUTION_COLUMNS[0]} with a boxed answer"
        )
    turns = [*system_turns(system), {"role": "user", "content": question}]
    # A dollar sign delimits math anywhere in the answer; an escaped one is a currency.
    return {"messages": turns, "answer": re.sub(r"(?<!\\)\$", "", str(answer)).strip()}


def sample_rows(rows: Dataset, count: int, seed: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield `count` random rows without repetition, numbered from 1, in the order of the dataset."""
    for index in sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))):
        yield index + 1, rows[index]


def write_rows(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows as a .jsonl file, and return their number."""
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
    parser.add_argument("--count", type=int, default=SAMPLED_ROWS, help="number of conversations to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", help="content of a system turn, for models whose chat template adds none")
    options = parser.parse_args()
    if options.count < 1:
        raise UserError(f"--count {options.count}: must be at least 1")
    with convert_write_errors(options.folder, "folder"):
        options.folder.mkdir(parents=True, exist_ok=True)
        file = options.folder / "train.jsonl"
        sampled = sample_rows(load_rows(options.train), options.count, options.seed)
        conversations = (
            conversation(row, f"{options.train}, row {number}", options.system) for number, row in sampled
        )
        print(f"{file}: {write_rows(file, conversations):,} conversations")
        for name in BENCHMARKS:
            source = vars(options)[name]
            file = options.folder / f"{name}.jsonl"
            rows = enumerate(load_rows(source), 1)
            count = write_rows(
                file, (problem(row, f"{source}, row {number}", options.system) for number, row in rows)
            )
            print(f"{file}: {count:,} problems")


if __name__ == "__main__":
    main()
