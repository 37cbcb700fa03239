"""Checkpoint folders: detect complete ones, find the one to resume from, remove old ones.

A checkpoint is first written under a temporary name. Once all its files are on disk, a manifest that lists
them is written, and the checkpoint is renamed. A folder without all files in its manifest is never used.
"""

import json
import pickle
import re
import shutil
import stat
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.console import say
from dft.errors import UserError
from dft.files import flush_to_disk, write_atomically
from dft.program import command_of

MANIFEST = "manifest.json"
"""The file of a checkpoint that describes it, and lists the size in bytes of every other file."""
UNFINISHED = "incomplete-"
"""Prefix of the name of a checkpoint that is being written, replaced or removed."""
FACTS = {"step", "resumable", "ranks", "rows_per_step", "parallelism", "order", "model"}
"""Keys of a manifest other than the list of files."""
NO_PICKLE = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
"""Exceptions raised only by files that torch cannot load."""
UNREADABLE = (
    *NO_PICKLE, OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip
"""Exceptions raised while reading a file of a checkpoint that is damaged."""
FILE_ERROR_MESSAGES = ("PytorchStreamReader", "loading state_dict", "state dict", "Weights only load failed")
"""Parts of the messages of RuntimeErrors that are raised for a damaged file."""
MAX_REASON = 300
"""Maximum number of characters shown of a library's error message."""
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        facts: what the manifest records in addition to the files: `step`, `resumable` (it holds more than the
            model), `ranks`, `rows_per_step`, `parallelism`, `order`, and `model`, the digest of its shapes.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """The optimizer step after which it was saved."""
        return self.facts["step"]


class IncompleteCheckpoint(Exception):
    """Raised when a folder is not a complete checkpoint. The message gives the reason."""


@contextmanager
def reading(folder: Path, raised: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Raise `UserError` if a file of a checkpoint cannot be read although it has the right size.

    Args:
        folder: the checkpoint.
        raised: exceptions that indicate a damaged file. Pass fewer in a context that does more than read.
    """
    errors: tuple[type[Exception], ...] = (*raised, RuntimeError)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in FILE_ERROR_MESSAGES):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"--resume_from_checkpoint {folder}: cannot be read ({reason[:MAX_REASON]}); it is damaged: "
            "remove it, and --resume_from_checkpoint auto resumes from the one before"
        ) from None


# ---- one folder ----


def unfinished(folder: Path) -> Path:
    """Return the path that a checkpoint is written to before it is renamed."""
    return folder.with_name(UNFINISHED + folder.name)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush all files of a checkpoint to disk, remove write access of other users, and write the manifest."""
    files = {}
    for path in _files(folder):
        _keep_to_owner(path)
        flush_to_disk(path)
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_atomically(folder / MANIFEST, [json.dumps({**facts, "files": files}, indent=1)])
    for path in [folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _keep_to_owner(path)
        flush_to_disk(path)


def publish(folder: Path) -> None:
    """Rename a sealed checkpoint to its final name, then remove the checkpoint it replaces."""
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
    """Remove a checkpoint. It is renamed first, in case the removal is interrupted."""
    doomed = folder.with_name(f"{UNFINISHED}removed-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder.

    Raises:
        IncompleteCheckpoint: the folder lacks a manifest, or anything that its manifest lists.
    """
    try:
        facts = json.loads((folder / MANIFEST).read_text())
        files = facts.pop("files").items()
        for name, size in files:
            written = (folder / name).stat().st_size
            if written != size:
                raise IncompleteCheckpoint(f"{name} has {written:,} of {size:,} bytes")
        missing = FACTS - facts.keys()
    except FileNotFoundError as error:
        name = Path(error.filename).relative_to(folder)
        raise IncompleteCheckpoint(f"it has no {name}") from None
    except (ValueError, KeyError, TypeError, AttributeError, NotADirectoryError):
        raise IncompleteCheckpoint(f"its {MANIFEST} cannot be read") from None
    if missing:
        raise IncompleteCheckpoint(f"its {MANIFEST} does not contain {', '.join(sorted(missing))}")
    return Checkpoint(folder, facts)


def new_run_advice(folder: Path) -> str:
    """Return how to train the model of a checkpoint in a new run, with a new optimizer."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        merge = command_of("scripts/merge_lora.py")
        return f"merge its adapters ({merge} {folder} NEW) and start a new run with --model_name_or_path NEW"
    return f"start a new run with --model_name_or_path {folder}"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _keep_to_owner(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        path.chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))


# ---- all of an output directory ----


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, newest first."""
    if not output_dir.is_dir():
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in output_dir.iterdir()]
    numbered = [(int(match[1]), path) for match, path in matches if match is not None]
    return [path for _, path in sorted(numbered, reverse=True) if path.is_dir()]


def unfinished_folders(output_dir: Path) -> list[Path]:
    """Return the folders that interrupted saves and removals left behind."""
    return sorted(path for path in output_dir.glob(f"{UNFINISHED}*checkpoint-*") if path.is_dir())


def newest_checkpoint(output_dir: Path, resumable: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest complete checkpoint, and the reason why each newer folder was skipped.

    Args:
        output_dir: folder to search.
        resumable: skip checkpoints that hold the model alone.
    """
    skipped = [f"{path}: was not completely written" for path in unfinished_folders(output_dir)]
    for folder in checkpoint_folders(output_dir):
        try:
            checkpoint = open_checkpoint(folder)
        except IncompleteCheckpoint as reason:
            skipped.append(f"{folder}: not complete, {reason}")
            continue
        if checkpoint.facts["resumable"] or not resumable:
            return checkpoint, skipped
        skipped.append(f"{folder}: holds the model alone, not the state of the optimizer")
    return None, skipped


def rotate(
    output_dir: Path, limit: int | None, best: str | None, in_use: Collection[Path] = frozenset()
) -> None:
    """Remove the oldest checkpoints beyond `limit`, except the newest, the best and those in use.

    Folders in use do not count, so that they do not take the place of other checkpoints.
    """
    folders = checkpoint_folders(output_dir)
    if not limit or not folders:
        return
    protected = {folders[0], *(path for path in folders if best is not None and path == Path(best))}
    counted = [path for path in folders if path in protected or path not in in_use]
    surplus = len(counted) - max(limit, len(protected))
    candidates = [path for path in reversed(folders) if path not in protected and path not in in_use]
    for folder in candidates[: max(0, surplus)]:
        remove(folder)


def clear_away(training: transformers.TrainingArguments) -> None:
    """Remove leftovers of interrupted saves and, under --overwrite_output_dir, checkpoints of an earlier run.

    Otherwise --resume_from_checkpoint auto would resume from the newest of them.
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
