"""Checkpoints as folders: which are complete, which one to go on from, which to remove.

A checkpoint is written under another name, gets a manifest of its files once all of them are on disk, and
takes its own name last. What has the name of a checkpoint but not all that its manifest lists is never used.
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

from dft.console import say
from dft.errors import UserError
from dft.files import flush_to_disk, write_atomically

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
    write_atomically(folder / MANIFEST, [json.dumps({**facts, "files": files}, indent=1)])
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


def rotate(
    output_dir: Path, limit: int | None, best: str | None, in_use: Collection[Path] = frozenset()
) -> None:
    """Remove the oldest checkpoints beyond `limit`, but never the newest, the best or one in use."""
    folders = checkpoint_folders(output_dir)
    if not limit or not folders:
        return
    protected = {folders[0], *(path for path in folders if best is not None and path == Path(best))}
    surplus = len(folders) - max(limit, len(protected))
    candidates = [path for path in reversed(folders) if path not in protected and path not in in_use]
    for folder in candidates[: max(0, surplus)]:
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
