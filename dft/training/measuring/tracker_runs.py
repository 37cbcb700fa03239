"""The file that names the tracker runs of a training run, so that a resumed run continues them."""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dft.console import say
from dft.files import write_atomically

RUNS_FILE = "tracker_runs.json"
"""Name of the file in the output directory."""
Identity = Mapping[str, str]
"""What identifies a run of a tracker: its id, and its name or folder where the tracker needs them."""


class TrackerRuns(TrainerCallback):
    """The identities of a run's tracker runs, in a file beside the checkpoints.

    Must come before the callbacks of the trackers. The file is written when a tracker starts, so that a run
    that is killed has it.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._runs: dict[str, Identity] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Read the file if the run resumes from a checkpoint in its output directory; remove it otherwise."""
        if not state.is_world_process_zero:
            return
        self._file = Path(args.output_dir) / RUNS_FILE
        self._runs = {}
        if state.global_step and resumes_in_place(args):
            self._runs = read_runs(self._file)
        else:
            self._file.unlink(missing_ok=True)

    def identity(self, tracker: str) -> Identity | None:
        """Return the identity of the tracker's run: the one to continue, or the one that was stored since."""
        return self._runs.get(tracker)

    def store(self, tracker: str, identity: Identity) -> None:
        """Write the identity of the tracker's current run. Without an effect outside of training."""
        if self._file is None:
            return
        if self._runs.get(tracker) == identity:
            return
        self._runs[tracker] = identity
        try:
            write_atomically(self._file, [json.dumps(self._runs, indent=2)])
        except OSError as error:  # a full disk must not stop training
            say(f"warning     {self._file} was not written: {error}; a resumed run starts new tracker runs")


def resumes_in_place(args: TrainingArguments) -> bool:
    """Return whether the checkpoint that a run resumes from is in its own output directory."""
    requested = args.resume_from_checkpoint
    if requested is None or str(requested).lower() in ("true", "auto"):
        return True
    return Path(requested).absolute().parent.resolve() == Path(args.output_dir).resolve()


def read_runs(file: Path) -> dict[str, Identity]:
    """Return the identities in a file; none, with a warning, if it cannot be read."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        say(f"warning     {file} cannot be read: {error}; the trackers start new runs")
        return {}
