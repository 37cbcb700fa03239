"""Select the checkpoint to resume from and check that it suits the run; `resumer` loads it."""

import os
import stat
import tempfile
from pathlib import Path

import transformers
from transformers.trainer import TRAINER_STATE_NAME

from dft.arguments.parser import Arguments
from dft.console import say
from dft.errors import UserError
from dft.ranks import data_parallel_size, describe_parallelism, rows_per_step, world_size
from dft.training.checkpoints.folder import (
    NAME,
    UNFINISHED,
    Checkpoint,
    IncompleteCheckpoint,
    new_run_advice,
    newest_checkpoint,
    open_checkpoint,
    reading,
    unfinished_folders,
)
from dft.training.checkpoints.input_folders import check_input_folders
from dft.training.checkpoints.run_settings import check_settings, training_settings


def prepare_output_folder(arguments: Arguments) -> None:
    """Create the output directory and check that it can be written to.

    Raises:
        UserError: it cannot be written to, the run reads from it, or flags about checkpoints contradict each
            other.
    """
    training = arguments.training
    if arguments.flags["output_dir"] is None:
        raise UserError("--output_dir is missing: name the folder to write to")
    if not training.output_dir:
        raise UserError("--output_dir '': name the folder to write to")
    check_input_folders(arguments)
    folder = Path(training.output_dir)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file, not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
    if arguments.data.prepare_only or arguments.watch.preflight or arguments.watch.plan:
        return
    requested = (training.resume_from_checkpoint or "false").lower()
    if training.overwrite_output_dir and requested != "false":
        raise UserError(
            f"--overwrite_output_dir True starts a new run, --resume_from_checkpoint "
            f"{training.resume_from_checkpoint} resumes; pass only one of them"
        )
    if training.enable_jit_checkpoint:
        raise UserError("--enable_jit_checkpoint True: every run saves when it gets SIGTERM; leave it out")


def resolve_resume(arguments: Arguments) -> tuple[str | None, list[str]]:
    """Return the folder of the checkpoint to resume from (None for a new run), and notes for the user.

    Raises:
        UserError: the requested checkpoint does not exist or cannot be resumed, or the output directory holds
            checkpoints of an earlier run and no flag specifies what to do with them.
    """
    training = arguments.training
    if arguments.data.prepare_only or arguments.watch.preflight or arguments.watch.plan:
        return None, []
    folder, word = Path(training.output_dir), (training.resume_from_checkpoint or "false").lower()
    checkpoint = find_checkpoint(training)
    if checkpoint is not None:
        return str(checkpoint.path), [f"resumes from step {checkpoint.step:,}, {checkpoint.path}"]
    if word == "auto":
        return None, [f"there is no checkpoint in {folder} to resume from: starts with step 1"]
    checkpoints = list(folder.glob("checkpoint-*"))
    if checkpoints and not training.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder}: holds {len(checkpoints)} checkpoint(s) of an earlier run; resume "
            "from them with --resume_from_checkpoint auto, choose another folder, or start a new run with "
            "--overwrite_output_dir True"
        )
    return None, []


def check_owner(folder: Path, trusted: bool) -> None:
    """Check that no other user can have written a checkpoint, because loading its optimizer can run code.

    Raises:
        UserError: another user owns it or a file in it, or others may write to it. Not raised if it is
            `trusted`.
    """
    if trusted:
        return
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        if status.st_uid != os.geteuid():
            fault = f"belongs to user {status.st_uid}, not to you (user {os.geteuid()})"
        elif not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fault = f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
        else:
            continue
        raise UserError(
            f"--resume_from_checkpoint {folder}: {path} {fault}, and a checkpoint can run code when it is "
            "loaded; if you know where it is from, change that (chown, chmod go-w) or give "
            "--trust_checkpoint True"
        )


def find_checkpoint(training: transformers.TrainingArguments) -> Checkpoint | None:
    """Return the checkpoint that --resume_from_checkpoint selects, or None for a new run.

    "auto" is the newest complete checkpoint in the output directory, or a new run if there is none; "True" is
    the same, except that it is an error if there is none.

    Raises:
        UserError: there is no such checkpoint, or this run cannot resume from it.
    """
    requested = training.resume_from_checkpoint
    word = (requested or "false").lower()
    if word == "false":
        return None
    if word in ("true", "auto"):
        checkpoint = _newest_of(training, word)
        if checkpoint is None:
            return None
    else:
        checkpoint = named_checkpoint(Path(requested))
    check_owner(checkpoint.path, training.trust_checkpoint)
    check_same_run(checkpoint, training)
    return checkpoint


def _newest_of(training: transformers.TrainingArguments, word: str) -> Checkpoint | None:
    output_dir = Path(training.output_dir)
    finish_renaming(output_dir)
    checkpoint, skipped = newest_checkpoint(output_dir)
    for line in skipped:
        say(f"skipped {line}")
    if checkpoint is not None:
        return checkpoint
    if word == "true":
        raise UserError(f"--resume_from_checkpoint True: there is no complete checkpoint in {output_dir}")
    if newest_checkpoint(output_dir, resumable=False)[0] is not None:
        raise UserError(
            f"--resume_from_checkpoint auto: the checkpoints in {output_dir} hold the model alone (saved "
            "with --save_only_model True), so there is nothing to resume from; choose another "
            "--output_dir, or start a new run with --overwrite_output_dir True and without "
            "--resume_from_checkpoint"
        )
    return None


def named_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder. Raise `UserError` if it is not complete or cannot be resumed."""
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint {path}: no such folder")
    try:
        checkpoint = open_checkpoint(path)
    except IncompleteCheckpoint as reason:
        raise UserError(
            f"--resume_from_checkpoint {path}: not a complete checkpoint, {reason}; "
            "--resume_from_checkpoint auto takes the newest complete one of the output directory"
        ) from None
    if not checkpoint.facts["resumable"]:
        raise UserError(
            f"--resume_from_checkpoint {path}: holds the model alone (saved with --save_only_model True), "
            f"not the state of the optimizer; {new_run_advice(path)}"
        )
    return checkpoint


def finish_renaming(output_dir: Path) -> None:
    """Rename checkpoints that were complete but not yet renamed when their run ended."""
    for staged in unfinished_folders(output_dir):
        folder = staged.with_name(staged.name.removeprefix(UNFINISHED))
        if NAME.fullmatch(folder.name) is None or folder.exists():
            continue
        try:
            open_checkpoint(staged)
            staged.rename(folder)
        except (IncompleteCheckpoint, FileNotFoundError):
            continue  # incomplete, or already renamed by another rank


def check_same_run(checkpoint: Checkpoint, training: transformers.TrainingArguments) -> None:
    """Raise `UserError` if this run cannot resume from a checkpoint."""
    flag, facts = f"--resume_from_checkpoint {checkpoint.path}", checkpoint.facts
    now = describe_parallelism(training)
    incompatible = ("DeepSpeed", "FSDP")
    if facts["parallelism"] != now and any(kind in facts["parallelism"] + now for kind in incompatible):
        raise UserError(
            f"{flag}: saved under {facts['parallelism']}, and this run is {now}; resume as it was saved, "
            f"or {new_run_advice(checkpoint.path)}"
        )
    if not (checkpoint.path / TRAINER_STATE_NAME).is_file():
        raise UserError(
            f"{flag}: has no {TRAINER_STATE_NAME}, which the first machine of its run wrote to a disk of its "
            "own; put --output_dir on a disk that all machines share (without DeepSpeed, "
            "--save_on_each_node True does as well)"
        )
    with reading(checkpoint.path):
        state = transformers.TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))
    check_settings(checkpoint.path, facts.get("settings", {}), training_settings(training))
    rows = rows_per_step(training)
    if facts["rows_per_step"] != rows:
        raise UserError(
            f"{flag}: saved with {facts['rows_per_step']} rows per step, and this run has {rows} "
            f"({training.per_device_train_batch_size} per device x {training.gradient_accumulation_steps} "
            f"accumulated x {world_size()} ranks), so neither its steps nor its place in the data would be "
            f"the same; {_same_rows(facts['rows_per_step'], training)}"
        )
    if training.max_steps > 0:
        asks_for_less = checkpoint.step > training.max_steps
    else:
        asks_for_less = (
            training.num_train_epochs < state.num_train_epochs and checkpoint.step >= state.max_steps
        )
    if asks_for_less:
        raise UserError(
            f"{flag}: is at step {checkpoint.step} already, and --max_steps or --num_train_epochs asks for "
            "less"
        )


def check_same_model(checkpoint: Checkpoint, model: str) -> None:
    """Raise `UserError` for a checkpoint of a model whose weights have different names or shapes.

    Args:
        checkpoint: to resume from.
        model: digest of the names and shapes of this run's weights.
    """
    if checkpoint.facts["model"] != model:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint.path}: is a checkpoint of another model than "
            "--model_name_or_path: its weights have other names or shapes; pass the model that the run began "
            "with"
        )


def _same_rows(rows: int, training: transformers.TrainingArguments) -> str:
    """Return flags that give `rows` rows per step on the ranks of this run."""
    ranks = data_parallel_size(training)
    per_rank, remainder = divmod(rows, ranks)
    if remainder or not per_rank:
        return f"{ranks} ranks cannot share {rows} rows evenly: take a number of ranks that can"
    batch = training.per_device_train_batch_size
    if per_rank % batch == 0:
        return f"give --gradient_accumulation_steps {per_rank // batch}"
    return f"give --per_device_train_batch_size 1 --gradient_accumulation_steps {per_rank}"
