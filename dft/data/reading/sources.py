"""Resolve the values of --data_files and --eval_data_files: files, folders, patterns and hub datasets."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from dft.errors import UserError

TEXT_KINDS = {".jsonl": "jsonl", ".json": "json"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES_IN_WORDS = ".jsonl or .json (both also with .gz or .zst) or .parquet"
HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/[\w.-]*\w)"
    r"(?:/(?P<config>[\w.+-]+))?"
    r"(?::(?P<split>.+))?"
)
SPLIT_NAME = re.compile(r"\w+(?:\.\w+)*")


@dataclass(frozen=True)
class DataFile:
    """A file to read.

    Attributes:
        name: name to show: the path as passed, as found in a folder or as matched by a pattern; or
            "owner/name:split" for a hub dataset.
        path: the file on disk.
        kind: "jsonl", "json", "parquet" or "arrow".
        compression: "gzip", "zstd" or None. Only "jsonl" and "json" files are compressed.
        entry: index of the command-line value that named the file.
        rows_before: rows of earlier files with the same name (the shards of a hub dataset).
    """

    name: str
    path: Path
    kind: str
    compression: str | None
    entry: int
    rows_before: int = 0


def resolve_sources(values: list[str], flag: str) -> list[DataFile]:
    """Return the files named by the values of a flag, in order. A file named twice is returned twice.

    A value is one of: a file; a folder, for all files below it that have a known suffix; a pattern with `*`,
    `?`, `[` or `**`, for all such files that match it; a dataset of the hub, `owner/name[/config][:split]`,
    which is downloaded if it is not cached. A value that exists on disk is never a pattern or a dataset.

    Raises:
        UserError: a value does not match anything, or its file is unreadable, empty or has an unknown suffix.
    """
    return [source for entry, value in enumerate(values) for source in _resolve(value, entry, flag)]


def _resolve(value: str, entry: int, flag: str) -> list[DataFile]:
    label = f"{flag} {value}"
    path = os.path.expanduser(value)
    if _exists(path, label):
        if not os.path.isdir(path):
            return [_data_file(path, entry, flag)]
        files = _files_below(path, label)
        if not files:
            raise UserError(f"{label}: is a folder that holds no file ending in {SUFFIXES_IN_WORDS}")
        return [_data_file(file, entry, flag) for file in files]
    hub = _match_hub_name(value)
    if hub and hub["split"] and not SPLIT_NAME.fullmatch(hub["split"]):
        raise UserError(
            f"{label}: {hub['split']!r} is not the name of a split; slices and sums of splits are not "
            f"supported; pass each split as a separate value, like {hub['name']}:train"
        )
    if glob.has_magic(path):
        return [_data_file(file, entry, flag) for file in _matching_files(path, label)]
    folder = Path(path).absolute().parent
    if hub:
        return _hub_sources(value, hub, entry, label, folder)
    raise UserError(f"{label}: no such file (looked in {folder})")


def split_suffix(path: str) -> tuple[str, str | None] | None:
    """Return the kind and compression of a file by its name, or None if its suffix is unknown."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    elif suffix == ".parquet":
        return "parquet", None
    kind = TEXT_KINDS.get(suffix)
    return (kind, compression) if kind else None


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
    if size == 0 and (compression or kind == "parquet"):
        raise UserError(f"{label}: the file is empty; it should hold at least one conversation")
    return DataFile(path, Path(path), kind, compression, entry)


def _files_below(folder: str, label: str) -> list[str]:
    """Return the files below a folder with a known suffix. Skips hidden files; follows each link once."""
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
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if split_suffix(file))


def _matching_files(pattern: str, label: str) -> list[str]:
    matched = [file for file in glob.glob(pattern, recursive=True) if not os.path.isdir(file)]
    if not matched:
        raise UserError(f"{label}: no file matches this pattern (looked from {Path.cwd()})")
    files = sorted(file for file in matched if split_suffix(file))
    if not files:
        raise UserError(f"{label}: no file that matches this pattern ends in {SUFFIXES_IN_WORDS}")
    return files


def _match_hub_name(value: str) -> re.Match[str] | None:
    """Split a value that has the form of a hub dataset name into its parts."""
    hub = HUB_NAME.fullmatch(value)
    return None if hub is None or split_suffix(value) else hub


def _hub_sources(value: str, hub: re.Match[str], entry: int, label: str, folder: Path) -> list[DataFile]:
    # These imports are slow, and most runs only read local files.
    import datasets
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError, XetDownloadError

    split = hub["split"] or "train"
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
        dataset = datasets.load_dataset(hub["name"], hub["config"], split=split)
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{label}: is neither an existing file (looked in {folder}) nor a dataset that could be loaded "
            f"({reason})"
        ) from None
    name = value if hub["split"] else f"{value}:{split}"
    sources, rows = [], 0
    for cached in dataset.cache_files:
        path = Path(cached["filename"])
        sources.append(DataFile(name, path, "arrow", None, entry, rows_before=rows))
        rows += sum(_batch_sizes(path))
    if not sources:
        raise UserError(f"{label}: the dataset has no rows on disk")
    assert rows == len(dataset), (rows, len(dataset))
    return sources


def _batch_sizes(path: Path) -> Iterator[int]:
    with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as batches:
        yield from (batch.num_rows for batch in batches)
