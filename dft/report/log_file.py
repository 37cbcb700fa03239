"""The log of a run as a file that grows with it, `log.jsonl`: a line for each record of the trainer's log.

`trainer_state.json` has the same records, but only in checkpoints and at the end of a run.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dft.console import say
from dft.files import write_atomically

LOG = "log.jsonl"


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the records of a log file, without the incomplete last line of a run that is writing it.

    Without a file there are no records. Damaged lines, as after a full disk, are left out.

    Raises:
        OSError: the file cannot be read.
    """
    if not file.is_file():
        return []
    records = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # broken JSON or UTF-8
            continue
        if is_record(record):
            records.append(record)
    return records


def is_record(value: Any) -> bool:
    """Return whether a value from a file is a record of the log, whose step, if there is one, is a number."""
    return isinstance(value, dict) and isinstance(value.get("step", 0), int)


class LogFileCallback(TrainerCallback):
    """Writes each record of the log to a file as soon as it is logged.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOG
        self._written = 0  # number of records in the file
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with the records of the checkpoint that the run resumes from, if it resumes."""
        if state.is_world_process_zero:
            self._write(state, starts=True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the new records, except for one of an evaluation, which is not complete yet."""
        is_evaluation = any(key.startswith("eval_") for key in state.log_history[-1])
        if state.is_world_process_zero and not is_evaluation:
            self._write(state, starts=False)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the record of the evaluation, which has the histogram of p by now."""
        if state.is_world_process_zero:
            self._write(state, starts=False)

    def _write(self, state: TrainerState, starts: bool) -> None:
        if self._failed:
            return
        records = state.log_history if starts else state.log_history[self._written :]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        try:
            if starts:
                write_atomically(self.file, lines)
            else:
                with open(self.file, "a", encoding="utf-8", errors="backslashreplace") as stream:
                    stream.writelines(lines)
        except OSError as error:  # a full disk must not stop training
            self._failed = True
            say(f"warning     {self.file} is not written any more, training continues: {error}")
        self._written = len(state.log_history)
