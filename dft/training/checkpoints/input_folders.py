"""Check that a run does not write into the folders that it reads from."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from dft.arguments.config_file import RUN_ARGS
from dft.arguments.parser import Arguments
from dft.data.preparing.evaluation_sets import parse_evaluation_files
from dft.errors import UserError
from dft.training.checkpoints.disk import WEIGHT_FILE
from dft.training.checkpoints.folder import NAME, UNFINISHED

REMOVABLE = re.compile(rf"{UNFINISHED}.*|{NAME.pattern}")
"""Pattern of the names of folders in an output directory that a run may remove."""


@dataclass(frozen=True)
class Input:
    """A folder or file that a run reads.

    Attributes:
        flag: the flag that names it, with its value.
        path: its path on disk.
        is_data: whether it holds data, rather than a model or a checkpoint.
    """

    flag: str
    path: Path
    is_data: bool


def check_input_folders(arguments: Arguments) -> None:
    """Raise `UserError` if a run would write into the folder of its model or data, or remove its input.

    Paths are compared by what they refer to, so links and different spellings of a path are recognized.
    Hidden folders in a data folder are allowed, because their files are not read as data.
    """
    if arguments.watch.plan:
        return  # writes nothing
    training = arguments.training
    inputs = list(find_inputs(arguments))
    targets = {
        "output_dir": training.output_dir,
        "data_cache_dir": arguments.data.data_cache_dir,
        "logging_dir": training.logging_dir,
    }
    for name, target in targets.items():
        for source in inputs:
            # A cache or a log next to a data file changes nothing that is read.
            if target and (name == "output_dir" or source.path.is_dir()):
                _check_target(f"--{name} {target}", Path(target).expanduser(), source)
    output_dir = Path(training.output_dir)
    for source in inputs:
        _check_not_removed(output_dir, source)
    for name in ("data_cache_dir", "logging_dir"):
        if targets[name]:
            _check_not_in_checkpoint(output_dir, name, targets[name])
    if not arguments.watch.preflight and not training.overwrite_output_dir:
        _check_foreign_model(output_dir)


def find_inputs(arguments: Arguments) -> Iterator[Input]:
    """Yield the folders and files on disk that the flags of a run name."""
    name = arguments.model.model_name_or_path
    if name and Path(name).expanduser().is_dir():
        yield Input(f"--model_name_or_path {name}", Path(name).expanduser(), is_data=False)
    checkpoint = arguments.training.resume_from_checkpoint
    if checkpoint and Path(checkpoint).is_dir():
        yield Input(f"--resume_from_checkpoint {checkpoint}", Path(checkpoint), is_data=False)
    data = arguments.data
    eval_files = parse_evaluation_files(data.eval_data_files).files
    for flag, values in (("--data_files", data.data_files), ("--eval_data_files", eval_files)):
        for value in values:
            path = os.path.expanduser(value)
            is_pattern = glob.has_magic(path) and not os.path.exists(path)
            for match in glob.iglob(path, recursive=True) if is_pattern else [path]:
                if os.path.exists(match) and not (is_pattern and os.path.isdir(match)):
                    yield Input(f"{flag} {value}", Path(match), is_data=True)


def _check_target(flag: str, target: Path, source: Input) -> None:
    folder = source.path if source.path.is_dir() else source.path.parent
    below = path_below(target, folder)
    if below is None:
        return
    remedy = "name another folder"
    if source.is_data:
        is_read = source.path.is_dir() and not any(part.startswith(".") for part in below.parts)
        if not below.parts:
            raise UserError(
                f"{flag}: is the folder of {source.flag}, and a run must not write next to its data; {remedy}"
            )
        if is_read:
            raise UserError(
                f"{flag}: is inside {source.flag}, so the files that the run writes would be read as data; "
                f"{remedy}"
            )
        return
    place = "is inside" if below.parts else "is"
    raise UserError(
        f"{flag}: {place} the folder of {source.flag}, and a run must not write into the folder that it "
        f"reads its weights from; {remedy}"
    )


def _check_not_removed(output_dir: Path, source: Input) -> None:
    below = path_below(source.path, output_dir)
    if below is None or source.flag.startswith("--resume_from_checkpoint"):
        return  # the checkpoint to resume from is normally in the output directory
    if below.parts and REMOVABLE.fullmatch(below.parts[0]):
        raise UserError(
            f"{source.flag}: is in {below.parts[0]} of --output_dir {output_dir}, which the run may replace "
            "or remove; name another --output_dir"
        )


def _check_not_in_checkpoint(output_dir: Path, name: str, target: str) -> None:
    """Raise `UserError` for a folder in a checkpoint of the output directory, which need not exist yet."""
    root, path = Path(os.path.realpath(output_dir)), Path(os.path.realpath(os.path.expanduser(target)))
    below = path_below(path, root)
    if below is None and path.is_relative_to(root):
        below = path.relative_to(root)
    if below is not None and below.parts and REMOVABLE.fullmatch(below.parts[0]):
        raise UserError(
            f"--{name} {target}: is in {below.parts[0]} of --output_dir {output_dir}, which the run may "
            "replace or remove; name another folder"
        )


def _check_foreign_model(folder: Path) -> None:
    """Raise `UserError` if a folder holds a model but no arguments of a run."""
    if not folder.is_dir() or (folder / RUN_ARGS).exists():
        return
    has_config = any((folder / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
    weights = sorted(path.name for path in folder.iterdir() if WEIGHT_FILE.fullmatch(path.name))
    if has_config and weights:
        raise UserError(
            f"--output_dir {folder}: holds a model ({weights[0]}) that no run with this output folder has "
            "written, and its weights would be replaced; name another folder, or give "
            "--overwrite_output_dir True"
        )


def check_not_model_folder(model: nn.Module, output_dir: Path) -> None:
    """Raise `UserError` if a folder is in the one that a model was loaded from, for use as a library."""
    config: Any = model.config
    if config.name_or_path and path_below(output_dir, Path(config.name_or_path)) is not None:
        raise UserError(
            f"output_dir {output_dir}: is in the folder that the model was loaded from, whose files would be "
            "replaced; name another folder"
        )


def path_below(path: Path, folder: Path) -> Path | None:
    """Return the path relative to a folder that contains it; None if the folder does not.

    Links are resolved, and folders are compared by their identity on disk.
    """
    try:
        identity = os.stat(folder)
    except OSError:
        return None
    resolved = Path(os.path.realpath(path))
    for parent in (resolved, *resolved.parents):
        if parent.exists() and os.path.samestat(os.stat(parent), identity):
            return resolved.relative_to(parent)
    return None
