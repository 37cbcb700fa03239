"""Checkpoints as folders: which are complete, which one to go on from, which to remove.

A checkpoint is written under another name, gets a manifest of its files once all of them are on disk, and
takes its own name last. What has the name of a checkpoint but not all that its manifest lists is never used.
"""

import json
import os
import pickle
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from dft.data.files import flush_to_disk, write_whole
from dft.errors import UserError
from dft.training.distributed import data_parallel_size, parallelism, rows_per_step, say, world_size

MANIFEST = "manifest.json"
"""In a checkpoint: what it is, and the size in bytes of every other file."""
UNFINISHED = "incomplete-"
"""In front of the name of a checkpoint that is being written, replaced or removed."""
FACTS = {"step", "resumable", "ranks", "rows_per_step", "parallelism", "order", "model"}
"""What a manifest says beside the files."""
NO_PICKLE = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What is raised by nothing but a file that torch cannot load."""
UNREADABLE = (
    *NO_PICKLE, OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip
"""What is raised where a file of a checkpoint does not hold what it should."""
OF_FILES = ("PytorchStreamReader", "loading state_dict", "state dict", "Weights only load failed")
"""Words in those RuntimeErrors that are about a file."""
MOST_SAID = 300
"""Characters of what a library says about a file."""
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete one.

    Attributes:
        path: its folder.
        facts: what the manifest says beside the files: `step`, `resumable` (it holds more than the model),
            `ranks`, `rows_per_step`, `parallelism`, `order`, and `model`, the digest of its shapes.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return self.facts["step"]


class IncompleteCheckpoint(Exception):
    """Why a folder is no complete checkpoint."""


@contextmanager
def reading(folder: Path, raised: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Raises `UserError` where what is in a checkpoint cannot be read, though all of it is there.

    Args:
        raised: what says so, in a context that does more than to read.
    """
    try:
        yield
    except UserError:
        raise
    except (*raised, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OF_FILES):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"--resume_from_checkpoint {folder}: cannot be read ({reason[:MOST_SAID]}); it is damaged: "
            "remove it, and --resume_from_checkpoint auto goes on from the one before"
        ) from None


# ---- one folder ----


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written before it may have its name."""
    return folder.with_name(UNFINISHED + folder.name)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Waits until all files of a checkpoint are on disk, keeps others from changing them, and lists them."""
    files = {}
    for path in _files(folder):
        _keep_to_owner(path)
        flush_to_disk(path)
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_whole(folder / MANIFEST, [json.dumps({**facts, "files": files}, indent=1)])
    for path in [folder / MANIFEST, *(one for one in folder.rglob("*") if one.is_dir()), folder]:
        _keep_to_owner(path)
        flush_to_disk(path)


def publish(folder: Path) -> None:
    """Gives a sealed checkpoint its name. One that has it already is removed afterwards."""
    staged, replaced = unfinished(folder), folder.with_name(f"{UNFINISHED}replaced-{folder.name}")
    if folder.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        folder.rename(replaced)
    staged.rename(folder)
    flush_to_disk(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def remove(folder: Path) -> None:
    """Removes a checkpoint; what is left of it if that is cut short has not its name any more."""
    doomed = folder.with_name(f"{UNFINISHED}removed-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Raises `IncompleteCheckpoint` for a folder that lacks anything its manifest lists, or a manifest."""
    try:
        facts = json.loads((folder / MANIFEST).read_text())
        files = facts.pop("files").items()
        for name, size in files:
            found = (folder / name).stat().st_size
            if found != size:
                raise IncompleteCheckpoint(f"{name} has {found:,} of {size:,} bytes")
        missing = FACTS - facts.keys()
    except FileNotFoundError as error:
        name = Path(error.filename).relative_to(folder)
        raise IncompleteCheckpoint(f"it has no {name}") from None
    except (ValueError, KeyError, TypeError, AttributeError, NotADirectoryError):
        raise IncompleteCheckpoint(f"its {MANIFEST} cannot be read") from None
    if missing:
        raise IncompleteCheckpoint(f"its {MANIFEST} says nothing of {', '.join(sorted(missing))}")
    return Checkpoint(folder, facts)


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


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _keep_to_owner(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        path.chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))


# ---- all of an output directory ----


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, the newest first."""
    if not output_dir.is_dir():
        return []
    named = [(int(found[1]), path) for path in output_dir.iterdir() if (found := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True) if path.is_dir()]


def unfinished_folders(output_dir: Path) -> list[Path]:
    """What interrupted saves and removals left behind."""
    return sorted(path for path in output_dir.glob(f"{UNFINISHED}*checkpoint-*") if path.is_dir())


def newest_checkpoint(output_dir: Path, resumable: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one: why it was passed over."""
    passed_over = [f"{path}: was not written to its end" for path in unfinished_folders(output_dir)]
    for folder in checkpoint_folders(output_dir):
        try:
            found = open_checkpoint(folder)
        except IncompleteCheckpoint as reason:
            passed_over.append(f"{folder}: not complete, {reason}")
            continue
        if found.facts["resumable"] or not resumable:
            return found, passed_over
        passed_over.append(f"{folder}: holds the model alone, not the state of the optimizer")
    return None, passed_over


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, but never the newest or the best."""
    if not limit:
        return
    folders = checkpoint_folders(output_dir)
    protected = {folders[0], *(path for path in folders if best is not None and path == Path(best))}
    surplus = len(folders) - max(limit, len(protected))
    for folder in [path for path in reversed(folders) if path not in protected][: max(0, surplus)]:
        remove(folder)


def clear_away(training: transformers.TrainingArguments) -> None:
    """Before training: under --overwrite_output_dir the checkpoints of an earlier run, and always what
    interrupted saves left behind.

    Left in place, the newest of them would be taken for this run's own by --resume_from_checkpoint auto.
    """
    output_dir = Path(training.output_dir)
    if not training.should_save:
        return
    if training.overwrite_output_dir and not training.resume_from_checkpoint:
        for folder in reversed(checkpoint_folders(output_dir)):
            remove(folder)
            say(f"--overwrite_output_dir True: removed {folder}")
    for folder in unfinished_folders(output_dir):
        shutil.rmtree(folder)


# ---- where to go on from ----


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
    now = parallelism(training)
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
