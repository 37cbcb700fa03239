"""Folders written by `save_to_disk` of the datasets library."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from dft.data.reading.arrow_files import count_rows
from dft.data.reading.data_file import DataFile
from dft.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files in the folder of a `Dataset` and of a `DatasetDict`."""


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (folder / SPLITS).is_file() or "_data_files" in _read_object(folder / STATE)


def saved_dataset(folder: Path, entry: int, label: str) -> list[DataFile]:
    """Return the Arrow files of a folder written by `save_to_disk`, with rows numbered across them.

    Raises:
        UserError: the folder holds several splits, or files of it are missing, damaged or of an old version.
    """
    if (folder / SPLITS).is_file():
        splits = _read_object(folder / SPLITS).get("splits", [])
        if len(splits) != 1:
            paths = " or ".join(str(folder / split) for split in splits)
            raise UserError(f"{label}: holds the splits {', '.join(splits)}; pass the one to use: {paths}")
        return saved_dataset(folder / splits[0], entry, label)
    state = _read_object(folder / STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{label}: is a selection of rows in the format of an old version of datasets; load it with that "
            "version and save it again"
        )
    files, rows = [], 0
    for item in state["_data_files"]:
        path = folder / item["filename"]
        try:
            count = count_rows(path)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{label}: {path.name} in it cannot be read ({reason})") from None
        files.append(DataFile(str(folder), path, "arrow", None, entry, rows_before=rows))
        rows += count
    if not rows:
        raise UserError(f"{label}: the dataset has no rows")
    return files


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
