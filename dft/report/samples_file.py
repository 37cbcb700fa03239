"""The file with the generated samples of a run, `samples.jsonl`: a line for each prompt and evaluation."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dft.console import say
from dft.files import write_atomically

SAMPLES = "samples.jsonl"
FIELDS = {
    "step": int, "sample": int, "file": str, "line": int, "question": str, "prompt": str, "reference": str,
    "answer": str, "tokens": int, "ended": bool,
}  # fmt: skip
"""Fields of a row with their types. `sample` is the number of the prompt, from 1, `question` the last message
of `prompt`, `tokens` the length of `answer` without its stop token, and `ended` whether there was one."""

Row = dict[str, Any]


def read_samples(file: Path) -> tuple[list[Row], int]:
    """Return the rows of a file of samples, and the number of lines that are not rows.

    A run that was killed may leave an incomplete last line. Without a file there are no rows.
    """
    if not file.is_file():
        return [], 0
    rows, damaged = [], 0
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # broken JSON or UTF-8
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in FIELDS.items()):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def append_samples(file: Path, rows: list[Row]) -> None:
    """Append rows to a file of samples. Raises `OSError` if it cannot be written to."""
    with open(file, "a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.writelines(_line(row) for row in rows)


def continue_samples(file: Path, step: int) -> int:
    """Remove the rows that a run will generate again when it starts or resumes.

    Args:
        file: the file of samples.
        step: optimizer step from which the run resumes; 0 if it starts, which removes the file.

    Returns:
        Number of lines that could not be read and were removed as well.
    """
    if not step:
        file.unlink(missing_ok=True)
        return 0
    rows, damaged = read_samples(file)
    remaining = [row for row in rows if row["step"] <= step]
    if damaged or len(remaining) < len(rows):
        write_atomically(file, map(_line, remaining))
    return damaged


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


class SamplesFileCallback(TrainerCallback):
    """Removes samples of later steps, or of an earlier run, from the output folder when training begins.

    Runs that generate no samples need it too: their reports would show those of another run.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / SAMPLES

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        try:
            damaged = continue_samples(self.file, state.global_step)
        except OSError as error:  # a full disk must not stop training
            say(f"warning     {self.file} cannot be updated: {error}")
            return
        if damaged:
            say(f"warning     {self.file}: removed {damaged} damaged lines")
