"""Resolve the values of --data_files and --eval_data_files: files, folders, patterns and hub datasets."""

import glob
import os
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from dft.data.reading.archives import zip_members
from dft.data.reading.arrow_files import count_rows
from dft.data.reading.data_file import (
    ARCHIVE,
    DESCRIPTIONS,
    SUFFIXES_IN_WORDS,
    TABLE_KINDS,
    DataFile,
    split_suffix,
)
from dft.data.reading.dataset_info import FILE_NAME, DatasetEntry, dataset_entry, first_entry, named_entry
from dft.data.reading.saved_datasets import is_saved_dataset, saved_dataset
from dft.errors import UserError

HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/[\w.-]*\w)"
    r"(?:/(?P<config>[\w.+-]+))?"
    r"(?::(?P<split>.+))?"
)
SPLIT_NAME = re.compile(r"\w+(?:\.\w+)*")


def resolve_sources(values: list[str], flag: str) -> list[DataFile]:
    """Return the files named by the values of a flag, in order. A file named twice is returned twice.

    A value is one of: a file; a zip archive, for all files in it that have a known suffix; a folder, for all
    such files below it, or for the rows of a dataset that `save_to_disk` wrote; a pattern with `*`, `?`, `[`
    or `**`, for all such files that match it; an entry of a description, `folder/dataset_info.json:name`; a
    dataset of the hub, `owner/name[/config][:split]`, which is downloaded if it is not cached. A value that
    exists on disk is never a pattern or a dataset.

    Raises:
        UserError: a value does not match anything, or its file is unreadable, empty or has an unknown suffix.
    """
    return [source for entry, value in enumerate(values) for source in _resolve(value, entry, flag)]


def _resolve(value: str, entry: int, flag: str) -> list[DataFile]:
    label = f"{flag} {value}"
    path = os.path.expanduser(value)
    if _exists(path, label):
        return _resolve_path(path, entry, flag)
    description = named_entry(path)
    if description is not None:
        return _described_files(dataset_entry(*description, label), entry, flag, label)
    hub = _match_hub_name(value)
    if hub and hub["split"] and not SPLIT_NAME.fullmatch(hub["split"]):
        raise UserError(
            f"{label}: {hub['split']!r} is not the name of a split; slices and sums of splits are not "
            f"supported; pass each split as a separate value, like {hub['name']}:train"
        )
    if glob.has_magic(path):
        return [
            source for file in _matching_files(path, label) for source in _resolve_path(file, entry, flag)
        ]
    folder = Path(path).absolute().parent
    if hub:
        name = value if hub["split"] else f"{value}:train"
        split = hub["split"] or "train"
        return _hub_sources(name, (hub["name"], hub["config"], split), entry, label, folder)
    raise UserError(f"{label}: no such file (looked in {folder})")


def _resolve_path(path: str, entry: int, flag: str) -> list[DataFile]:
    """Return the files of an existing path."""
    label = f"{flag} {path}"
    if not os.path.isdir(path):
        if os.path.basename(path) == FILE_NAME:
            raise UserError(
                f"{label}: describes datasets; name one of its entries, like {first_entry(path, label)}"
            )
        if path.lower().endswith(ARCHIVE):
            return zip_members(path, entry, label)
        return [_data_file(path, entry, flag)]
    if is_saved_dataset(Path(path)):
        return saved_dataset(Path(path), entry, label)
    files = _files_below(path, label)
    if not files:
        raise UserError(f"{label}: is a folder that holds no file ending in {SUFFIXES_IN_WORDS}")
    return [source for file in files for source in _resolve_path(file, entry, flag)]


def _described_files(described: DatasetEntry, entry: int, flag: str, label: str) -> list[DataFile]:
    """Return the files of an entry of dataset_info.json, with its rules."""
    if described.hub is None:
        if not os.path.exists(described.path):
            raise UserError(f"{label}: its file {described.path} does not exist")
        if os.path.isfile(described.path):
            described.check_digest(label)
        sources = _resolve_path(described.path, entry, flag)
    else:
        name, config, split = described.hub
        shown = "/".join(part for part in (name, config) if part)
        sources = _hub_sources(f"{shown}:{split}", described.hub, entry, label, Path.cwd())
    return [replace(source, rules=described.rules) for source in sources]


def _exists(path: str, label: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror})") from None
    return True


def _data_file(path: str, entry: int, flag: str) -> DataFile:
    label = f"{flag} {path}"
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path):
            raise UserError(f"{label}: is not a regular file; pass a file that ends in {SUFFIXES_IN_WORDS}")
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror})") from None
    suffix = split_suffix(path)
    if suffix is None:
        raise UserError(f"{label}: expected a file that ends in {SUFFIXES_IN_WORDS}")
    kind, compression = suffix
    # An empty text file is reported with the errors of its content: it has no conversation.
    if size == 0 and (compression or kind in TABLE_KINDS.values()):
        raise UserError(f"{label}: the file is empty; it should hold at least one conversation")
    return DataFile(path, Path(path), kind, compression, entry)


def _files_below(folder: str, label: str) -> list[str]:
    """Return the data files below a folder, sorted, with folders written by `save_to_disk` as a whole.

    Skips hidden files and descriptions of datasets; follows each link once.
    """
    seen: set[str] = set()
    files: list[str] = []

    def refuse(error: OSError) -> None:  # os.walk would silently skip the folder
        raise UserError(f"{label}: {error.filename} cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in seen
        )
        saved = [name for name in folders if is_saved_dataset(Path(parent, name))]
        folders[:] = [name for name in folders if name not in saved]
        files += [os.path.join(parent, name) for name in saved]
        files += [
            os.path.join(parent, name)
            for name in names
            if not name.startswith(".") and name not in DESCRIPTIONS and _is_readable(name)
        ]
    return sorted(files)


def _is_readable(name: str) -> bool:
    return split_suffix(name) is not None or name.lower().endswith(ARCHIVE)


def _matching_files(pattern: str, label: str) -> list[str]:
    matched = [file for file in glob.glob(pattern, recursive=True) if not os.path.isdir(file)]
    if not matched:
        raise UserError(f"{label}: no file matches this pattern (looked from {Path.cwd()})")
    files = sorted(
        file for file in matched if _is_readable(file) and os.path.basename(file) not in DESCRIPTIONS
    )
    if not files:
        raise UserError(f"{label}: no file that matches this pattern ends in {SUFFIXES_IN_WORDS}")
    return files


def _match_hub_name(value: str) -> re.Match[str] | None:
    """Split a value that has the form of a hub dataset name into its parts."""
    hub = HUB_NAME.fullmatch(value)
    return None if hub is None or split_suffix(value) else hub


def _hub_sources(
    name: str, hub: tuple[str, str | None, str], entry: int, label: str, folder: Path
) -> list[DataFile]:
    """Return the Arrow files of a hub dataset.

    Args:
        name: name to show.
        hub: name, configuration and split of the dataset.
        entry: index of the command-line value.
        label: the flag and its value, for error messages.
        folder: folder in which a file of this name was looked for.
    """
    # These imports are slow, and most runs only read local files.
    import datasets
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError, XetDownloadError

    # All exceptions raised while loading derive from these base classes. OSError: unknown, gated or
    # unreachable dataset, offline mode, full disk. ValueError: unknown configuration or split, malformed
    # name. RuntimeError: dataset that is a script. DatasetsError: files that are not a table.
    errors = (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        httpx.HTTPError,
        pa.ArrowException,
        EntryNotFoundError,
        RevisionResolutionError,
        XetDownloadError,
    )
    try:
        dataset = datasets.load_dataset(hub[0], hub[1], split=hub[2])
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{label}: is neither an existing file (looked in {folder}) nor a dataset that could be loaded "
            f"({reason})"
        ) from None
    sources, rows = [], 0
    for cached in dataset.cache_files:
        path = Path(cached["filename"])
        sources.append(DataFile(name, path, "arrow", None, entry, rows_before=rows))
        rows += count_rows(path)
    if not sources:
        raise UserError(f"{label}: the dataset has no rows on disk")
    assert rows == len(dataset), (rows, len(dataset))
    return sources
