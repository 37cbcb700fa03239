"""Choose and check the checkpoint that a run resumes from."""

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
    newest_checkpoint,
    open_checkpoint,
    reading,
    unfinished_folders,
)


def check_output(arguments: Arguments) -> None:
    training = arguments.training
    if arguments.flags["output_dir"] is None:
        raise UserError("--output_dir is missing: name the folder to write to")
    if not training.output_dir:
        raise UserError("--output_dir '': name the folder to write to")
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
    wanted = (training.resume_from_checkpoint or "false").lower()
    if training.overwrite_output_dir and wanted != "false":
        raise UserError(
            f"--overwrite_output_dir True starts afresh, --resume_from_checkpoint "
            f"{training.resume_from_checkpoint} goes on; give one"
        )
    if training.enable_jit_checkpoint:
        raise UserError("--enable_jit_checkpoint True: every run saves when it gets SIGTERM; leave it out")
    resume = resolve_resume(training)
    if resume is not None:
        arguments.notes.append(f"goes on from step {resume.step:,}, {resume.path}")
    elif wanted == "auto":
        arguments.notes.append(f"there is no checkpoint in {folder} to go on from: starts with step 1")
    checkpoints = list(folder.glob("checkpoint-*"))
    if checkpoints and resume is None and wanted != "auto" and not training.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder}: holds {len(checkpoints)} checkpoint(s) of an earlier run; go on from "
            "them with --resume_from_checkpoint auto, choose another folder, or start afresh with "
            "--overwrite_output_dir True"
        )


def check_owner(folder: Path, trusted: bool) -> None:
    """Refuses a checkpoint that somebody else may have written: loading its optimizer can run code.

    Raises:
        UserError: another user owns it or a file in it, or others may write to it; not if it is `trusted`.
    """
    if trusted:
        return
    for path in [folder, *folder.rglob("*")]:
        found = path.lstat()
        if found.st_uid != os.geteuid():
            fault = f"belongs to user {found.st_uid}, not to you (user {os.geteuid()})"
        elif not stat.S_ISLNK(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fault = f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
        else:
            continue
        raise UserError(
            f"--resume_from_checkpoint {folder}: {path} {fault}, and a checkpoint can run code when it is "
            "loaded; if you know where it is from, change that (chown, chmod go-w) or give "
            "--trust_checkpoint True"
        )


def resolve_resume(training: transformers.TrainingArguments) -> Checkpoint | None:
    """The checkpoint to go on from, which takes the place of what --resume_from_checkpoint said.

    auto is the newest complete one in the output directory, or a new start where there is none at all; True
    is the same, but insists on one.
    """
    wanted = training.resume_from_checkpoint
    word = (wanted or "false").lower()
    training.resume_from_checkpoint = None
    if word == "false":
        return None
    if word in ("true", "auto"):
        found = _newest_of(training, word)
        if found is None:
            return None
    else:
        found = named_checkpoint(Path(wanted))
    check_owner(found.path, training.trust_checkpoint)
    check_same_run(found, training)
    training.resume_from_checkpoint = str(found.path)
    return found


def _newest_of(training: transformers.TrainingArguments, word: str) -> Checkpoint | None:
    output_dir = Path(training.output_dir)
    finish_renaming(output_dir)
    found, passed_over = newest_checkpoint(output_dir)
    for line in passed_over:
        say(f"passed over {line}")
    if found is not None:
        return found
    if word == "true":
        raise UserError(f"--resume_from_checkpoint True: there is no complete checkpoint in {output_dir}")
    if newest_checkpoint(output_dir, resumable=False)[0] is not None:
        raise UserError(
            f"--resume_from_checkpoint auto: the checkpoints in {output_dir} hold the model alone (saved "
            "with --save_only_model True), so there is nothing to go on from; choose another --output_dir, "
            "or start afresh with --overwrite_output_dir True and without --resume_from_checkpoint"
        )
    return None


def named_checkpoint(path: Path) -> Checkpoint:
    """Raises `UserError` for a folder that is no complete checkpoint to go on from."""
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint {path}: no such folder")
    try:
        found = open_checkpoint(path)
    except IncompleteCheckpoint as reason:
        raise UserError(
            f"--resume_from_checkpoint {path}: not a complete checkpoint, {reason}; "
            "--resume_from_checkpoint auto takes the newest complete one of the output directory"
        ) from None
    if not found.facts["resumable"]:
        raise UserError(
            f"--resume_from_checkpoint {path}: holds the model alone (saved with --save_only_model True), "
            f"not the state of the optimizer; start a new run with --model_name_or_path {path}"
        )
    return found


def finish_renaming(output_dir: Path) -> None:
    """A checkpoint that was sealed, and whose run ended before it got its name, gets it now."""
    for staged in unfinished_folders(output_dir):
        folder = staged.with_name(staged.name.removeprefix(UNFINISHED))
        if NAME.fullmatch(folder.name) is None or folder.exists():
            continue
        try:
            open_checkpoint(staged)
            staged.rename(folder)
        except (IncompleteCheckpoint, FileNotFoundError):
            continue  # half-written, or another rank was quicker


def check_same_run(found: Checkpoint, training: transformers.TrainingArguments) -> None:
    """Raises `UserError` where this run cannot go on from a checkpoint."""
    what, facts = f"--resume_from_checkpoint {found.path}", found.facts
    now = describe_parallelism(training)
    apart = ("DeepSpeed", "FSDP")
    if facts["parallelism"] != now and any(one in facts["parallelism"] + now for one in apart):
        raise UserError(
            f"{what}: saved under {facts['parallelism']}, and this run is {now}; go on as it was, or start a "
            f"new run with --model_name_or_path {found.path}"
        )
    if not (found.path / TRAINER_STATE_NAME).is_file():
        raise UserError(
            f"{what}: has no {TRAINER_STATE_NAME}, which the first machine of its run wrote to a disk of its "
            "own; let --output_dir be on a disk that all machines share (without DeepSpeed, "
            "--save_on_each_node True does as well)"
        )
    with reading(found.path):
        state = transformers.TrainerState.load_from_json(str(found.path / TRAINER_STATE_NAME))
    rows = rows_per_step(training)
    if facts["rows_per_step"] != rows:
        raise UserError(
            f"{what}: saved with {facts['rows_per_step']} rows per step, and this run has {rows} "
            f"({training.per_device_train_batch_size} per device x {training.gradient_accumulation_steps} "
            f"accumulated x {world_size()} ranks), so neither its steps nor its place in the data would be "
            f"the same; {_same_rows(facts['rows_per_step'], training)}"
        )
    if training.max_steps > 0:
        asks_for_less = found.step > training.max_steps
    else:
        asks_for_less = training.num_train_epochs < state.num_train_epochs and found.step >= state.max_steps
    if asks_for_less:
        raise UserError(
            f"{what}: is at step {found.step} already, and --max_steps or --num_train_epochs asks for less"
        )


def check_same_model(found: Checkpoint, model: str) -> None:
    """Raises `UserError` for a checkpoint of a model with other weights than this run has."""
    if found.facts["model"] != model:
        raise UserError(
            f"--resume_from_checkpoint {found.path}: is a checkpoint of another model than "
            "--model_name_or_path: its weights have other names or shapes; give the model that the run began "
            "with"
        )


def _same_rows(wanted: int, training: transformers.TrainingArguments) -> str:
    """Which flags give as many rows per step on the ranks of this run."""
    ranks = data_parallel_size(training)
    per_rank, rest = divmod(wanted, ranks)
    if rest or not per_rank:
        return f"{ranks} ranks cannot share {wanted} rows evenly: take a number of ranks that can"
    batch = training.per_device_train_batch_size
    if per_rank % batch == 0:
        return f"give --gradient_accumulation_steps {per_rank // batch}"
    return f"give --per_device_train_batch_size 1 --gradient_accumulation_steps {per_rank}"
