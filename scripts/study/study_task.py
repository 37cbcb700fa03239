"""The tasks of the study: sums and differences that are worked out step by step, some with a wrong step."""

import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.files import write_atomically
from scripts.make_example import train_tokenizer


class Data(NamedTuple):
    """A data set to fine-tune on.

    Attributes:
        task: "sums" or "differences".
        wrong: share of the answers with a wrong step.
        asked: the files of problems that the fine-tuned models are tested on.
    """

    task: str
    wrong: float
    asked: tuple[str, ...]


WRONG = "sums, 3 in 10 wrong"
"""The data set with wrong answers."""
DATA = {
    "right sums": Data("sums", 0.0, ("sums-three", "sums-five")),
    WRONG: Data("sums", 0.3, ("sums-three", "sums-five")),
    "differences": Data("differences", 0.0, ("differences-three", "differences-five", "sums-three")),
}


class Size(NamedTuple):
    """The size of a study. Its fields are keys of study.json.

    Attributes:
        pretraining: conversations to train the base model on.
        tuning: conversations to fine-tune on, by task.
        asked: problems per file of problems.
        samples: answers to each problem.
        seeds: number of seeds.
        rates: learning rates to select from, by task.
    """

    pretraining: int
    tuning: dict[str, int]
    asked: int
    samples: int
    seeds: int
    rates: dict[str, tuple[float, ...]]


TASKS = ("sums", "differences")
SETS = {"three": 3, "five": 5}
"""Number of numbers in the problems of each file."""
COLUMNS = [(name, asked) for name, data in DATA.items() for asked in data.asked]
"""Pairs of a data set and a file of problems: the columns of the tables."""


def file_name(name: str) -> str:
    """Return the name of a data set without commas and spaces."""
    return name.replace(",", "").replace(" ", "_")


def chain(numbers: Sequence[int], sign: str = "+", wrong_step: int | None = None, slip: int = 0) -> str:
    """Return a sum or difference worked out from left to right.

    Args:
        numbers: the numbers.
        sign: "+" or "-".
        wrong_step: index of a step with a wrong result, which the following steps build on.
        slip: error added to the correct result of that step.
    """
    total, lines = numbers[0], []
    for step, number in enumerate(numbers[1:]):
        result = total + (number if sign == "+" else -number) + (slip if step == wrong_step else 0)
        lines.append(f"{total}{sign}{number}={result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])


def conversation(generator: random.Random, task: str, count: int, wrong: float = 0.0) -> dict[str, Any]:
    """Return a random problem and its answer.

    The first number of a difference is large enough to keep all results above zero.

    Args:
        generator: source of randomness.
        task: "sums" or "differences".
        count: number of numbers in the problem.
        wrong: probability of an answer with a wrong step.
    """
    numbers = [generator.randint(10, 99) for _ in range(count)]
    sign = "+"
    if task == "differences":
        sign = "-"
        numbers = [generator.randint(200, 299), *(generator.randint(10, 49) for _ in range(count - 1))]
    step, slip = None, 0
    if generator.random() < wrong:
        step, slip = generator.randrange(count - 1), generator.choice([-10, -2, -1, 1, 2, 10])
    return {
        "messages": [
            {"role": "user", "content": sign.join(map(str, numbers))},
            {"role": "assistant", "content": chain(numbers, sign, step, slip)},
        ]
    }


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a .jsonl file."""
    write_atomically(file, (json.dumps(row) + "\n" for row in rows))


def questions(file: Path) -> list[str]:
    """Return the question of each line of a file."""
    return [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]


def write_data(folder: Path, size: Size) -> None:
    """Write all data of the study. The files are the same each time."""
    generator = random.Random("pretraining")
    rows = [conversation(generator, "sums", generator.randint(2, 5)) for _ in range(size.pretraining)]
    write_rows(folder / "pretraining.jsonl", rows)
    for task in TASKS:
        for name, count in {**SETS, "validation": 3}.items():
            generator = random.Random(f"{task} {name}")
            rows = [conversation(generator, task, count) for _ in range(size.asked)]
            write_rows(folder / f"{task}-{name}.jsonl", rows)
    for (name, data), seed in product(DATA.items(), range(-1, size.seeds)):
        generator = random.Random(f"tuning {name} {seed}")
        rows = [conversation(generator, data.task, 3, data.wrong) for _ in range(size.tuning[data.task])]
        write_rows(folder / tuning_file(name, seed), rows)


def tuning_file(data: str, seed: int) -> str:
    """Return the name of the file to fine-tune on."""
    return f"tuning-{file_name(data)}-{seed}.jsonl"


def write_model(folder: Path, data: Path) -> None:
    """Write a model with 0.9 million random weights, and a tokenizer of single characters and `##`."""
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()[:200]]
    tokenizer = train_tokenizer(rows, vocab_size=260)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        initializer_range=0.08, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
