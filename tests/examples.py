"""The model and data of the runs that tests start."""

import json
from dataclasses import dataclass
from pathlib import Path

from scripts.make_example import read_conversations, tiny_model, train_tokenizer, write_conversations

OTHER = [
    {
        "messages": [
            {"role": "user", "content": f"Count: {n}"},
            {"role": "assistant", "content": str(n + 1)},
        ],
        "id": n,
    }
    for n in range(3)
]
"""Rows of a second data file, with a column that the first one lacks."""


@dataclass(frozen=True)
class Example:
    """A tiny model, its data, and the working folder of runs."""

    folder: Path
    model: Path
    train: Path
    other: Path
    eval: Path

    def words(self, output: Path, **flags: object) -> list[str]:
        """Return the command line of a short run; `flags` override its settings."""
        settings: dict[str, object] = {
            "model_name_or_path": self.model,
            "data_files": self.train,
            "eval_data_files": self.eval,
            "output_dir": output,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 7,
            "report": False,  # writing a report takes a second
            **flags,
        }
        words = []
        for name, value in settings.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words


def weighted_copy(file: Path) -> Path:
    """Return a copy of a file of conversations in which two rows of three have a weight other than 1.

    The rows have the weights 1, 0.25 and 2. Answers of every fourth row have half that weight.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["weight"] = (1, 0.25, 2)[number % 3]
        for message in row["messages"]:
            if number % 4 == 0 and message["role"] == "assistant":
                message["weight"] = 0.5
    copy = file.with_name(f"weighted-{file.name}")
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copy


def make_example(folder: Path) -> Example:
    train, evaluation = write_conversations(folder / "data", count=330)
    tokenizer = train_tokenizer(read_conversations(train))
    model = folder / "model"
    tiny_model(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    other = folder / "data" / "other.json"
    other.write_text(json.dumps(OTHER))
    return Example(folder, model, train, other, evaluation)
