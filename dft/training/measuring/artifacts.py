"""Log the final model and the reports of a run to trackers as artifacts."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback

from dft.console import say
from dft.errors import UserError
from dft.ranks import is_main_process
from dft.training.measuring.tracker_runs import TrackerRuns

REPORTS = ("report.html", "data_report.json")
"""Files of the output directory that are logged beside the model."""
Groups = dict[str, list[str]]
"""Paths of files, relative to the output directory, by artifact."""


def log_artifacts(
    args: transformers.TrainingArguments, model_files: Sequence[str], callbacks: Iterable[TrainerCallback]
) -> None:
    """Log the final model and the reports to the trackers that have artifacts, on rank 0.

    Args:
        args: the training arguments.
        model_files: names of the files of the final model in the output directory.
        callbacks: callbacks of the trainer, which know the runs of the trackers.

    Raises:
        UserError: a tracker did not accept them. The model is saved.
    """
    runs = next((callback for callback in callbacks if isinstance(callback, TrackerRuns)), None)
    if not is_main_process() or runs is None:
        return
    folder = Path(args.output_dir)
    groups: Groups = {
        "model": [name for name in model_files if (folder / name).is_file()],
        "report": [name for name in REPORTS if (folder / name).is_file()],
    }
    groups = {name: files for name, files in groups.items() if files}
    for tracker, (send, errors) in SENDERS.items():
        identity = runs.identity(tracker) if tracker in args.report_to else None
        if identity is None:
            continue
        refusals: tuple[type[Exception], ...] = (OSError, *errors())
        try:
            send(identity["id"], folder, groups)
        except refusals as error:
            raise UserError(
                f"--log_artifacts True: {tracker} did not accept the artifacts ({error}); the model is saved "
                f"in {folder}, and nothing has to be trained again"
            ) from None
        count = sum(map(len, groups.values()))
        say(f"artifacts   {count} files logged to {tracker}: {', '.join(groups)}")


def _send_to_wandb(run: str, folder: Path, groups: Groups) -> None:
    import wandb  # already imported by its callback

    for kind, files in groups.items():
        artifact = wandb.Artifact(f"{kind}-{run}", type=kind)
        for name in files:
            artifact.add_file(str(folder / name), name=name)
        wandb.log_artifact(artifact)


def _send_to_mlflow(run: str, folder: Path, groups: Groups) -> None:
    import mlflow  # already imported by its callback

    client = mlflow.MlflowClient()  # the run has ended with training
    for kind, files in groups.items():
        for name in files:
            parent = Path(name).parent
            client.log_artifact(run, str(folder / name), (kind / parent).as_posix())


def _send_to_trackio(run: str, folder: Path, groups: Groups) -> None:
    import trackio  # already imported by its callback

    for kind, files in groups.items():
        artifact = trackio.Artifact(f"{kind}-{run}", type=kind)
        for name in files:
            artifact.add_file(str(folder / name), name=name)
        trackio.log_artifact(artifact)


def _wandb_errors() -> tuple[type[Exception], ...]:
    import wandb

    return (wandb.Error,)


def _mlflow_errors() -> tuple[type[Exception], ...]:
    import mlflow

    return (mlflow.exceptions.MlflowException,)


Sender = tuple[Callable[[str, Path, Groups], Any], Callable[[], tuple[type[Exception], ...]]]
SENDERS: dict[str, Sender] = {
    "wandb": (_send_to_wandb, _wandb_errors),
    "mlflow": (_send_to_mlflow, _mlflow_errors),
    "trackio": (_send_to_trackio, lambda: (RuntimeError, ValueError)),
}
"""For each tracker with artifacts, the function that sends them and the errors of its client."""
