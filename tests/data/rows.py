"""Helpers to write conversations to files and read datasets."""

import json
from pathlib import Path

from dft.data.batches.dataset import Sequences

Row = dict[str, object]


def conversation(question: str, answer: str = "a", **columns: object) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def numbered(count: int, start: int = 0) -> list[Row]:
    return [conversation(f"question {number}", f"answer {number}") for number in range(start, start + count)]


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def column(dataset: Sequences, name: str) -> list[list[int]]:
    """Return one column of all rows as plain lists."""
    return [row[name] if name == "seq_lengths" else row[name].tolist() for row in dataset]
