"""The tasks of scripts/study/study.py: sums and differences worked out step by step, some of them wrong."""

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

from scripts.make_example import train_tokenizer


class Data(NamedTuple):
    """What is fine-tuned on: a task, the share of chains with a wrong step, and what is asked afterwards."""

    task: str
    wrong: float
    asked: tuple[str, ...]


DATA = {
    "right sums": Data("sums", 0.0, ("sums-three", "sums-five")),
    "sums, 3 in 10 wrong": Data("sums", 0.3, ("sums-three", "sums-five")),
    "differences": Data("differences", 0.0, ("differences-three", "differences-five", "sums-three")),
}


class Size(NamedTuple):
    """How much of everything: conversations for the base model and, by task, to fine-tune on; problems that
    are asked, answers to each, seeds; learning rates by task."""

    pretraining: int
    tuning: dict[str, int]
    asked: int
    samples: int
    seeds: int
    rates: dict[str, tuple[float, ...]]


TASKS = ("sums", "differences")
SETS = {"three": 3, "five": 5}
"""Numbers in the problems that are asked."""
COLUMNS = [(data, asked) for data, one in DATA.items() for asked in one.asked]


def plain(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


def chain(numbers: Sequence[int], sign: str = "+", wrong_step: int | None = None, slip: int = 0) -> str:
    """A sum or difference worked out from left to right. A wrong step is off by `slip`, and the rest goes on
    from it."""
    total, lines = numbers[0], []
    for step, number in enumerate(numbers[1:]):
        result = total + (number if sign == "+" else -number) + (slip if step == wrong_step else 0)
        lines.append(f"{total}{sign}{number}={result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])


def conversation(generator: random.Random, task: str, count: int, wrong: float = 0.0) -> dict[str, Any]:
    """A problem of so many numbers with two digits, and its chain, wrong with some probability.

    Of a difference the first number is larger, so that what is left stays above zero.
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


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(file: Path) -> list[str]:
    """What the user asks, line by line."""
    return [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]


def write_data(folder: Path, size: Size) -> None:
    """All data of the study, the same each time."""
    generator = random.Random("pretraining")
    rows = [conversation(generator, "sums", generator.randint(2, 5)) for _ in range(size.pretraining)]
    write(folder / "pretraining.jsonl", rows)
    for task in TASKS:
        for name, count in {**SETS, "validation": 3}.items():
            generator = random.Random(f"{task} {name}")
            rows = [conversation(generator, task, count) for _ in range(size.asked)]
            write(folder / f"{task}-{name}.jsonl", rows)
    for (name, data), seed in product(DATA.items(), range(-1, size.seeds)):
        generator = random.Random(f"tuning {name} {seed}")
        rows = [conversation(generator, data.task, 3, data.wrong) for _ in range(size.tuning[data.task])]
        write(folder / tuning_file(name, seed), rows)


def tuning_file(data: str, seed: int) -> str:
    return f"tuning-{plain(data)}-{seed}.jsonl"


def write_model(folder: Path, data: Path) -> None:
    """An untrained model of 0.9 million weights, and a tokenizer of single characters, but for `##`."""
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
