"""What the values of --data_files and --eval_data_files mean: files, folders, patterns, hub datasets."""

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
PLAIN = (("jsonl", None), ("json", None))
SUFFIXES = (*TEXT_KINDS, *(text + packed for text in TEXT_KINDS for packed in COMPRESSIONS), ".parquet")
ENDINGS = ".jsonl or .json (both also with .gz or .zst) or .parquet"
HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/[\w.-]*\w)"
    r"(?:/(?P<config>[\w.+-]+))?"
    r"(?::(?P<split>.+))?"
)
SPLIT = re.compile(r"\w+(?:\.\w+)*")


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        name: what a person is shown: the path (as given, or as found in a folder or by a pattern), or
            "owner/name:split".
        path: the file on disk.
        kind: "jsonl", "json", "parquet" or "arrow".
        compression: "gzip", "zstd" or None; only of "jsonl" and "json".
        entry: index of the command-line value it comes from.
        rows_before: rows of earlier files under the same name (the shards of a dataset of the hub).
    """

    name: str
    path: Path
    kind: str
    compression: str | None
    entry: int
    rows_before: int = 0


def resolve_sources(values: list[str], flag: str) -> list[Source]:
    """The files that the values of a flag name, in their order; a file named twice is there twice.

    A value is a file; a folder, for all files below it that have a known suffix; a pattern of `*`, `?`, `[`
    and `**`, for all such files that it matches; or a dataset of the hub, `owner/name[/config][:split]`,
    which is downloaded if it is not cached. What exists on disk goes before every other meaning of a value.

    Raises:
        UserError: a value names nothing, or something that cannot be read, is empty or of an unknown kind.
    """
    return [source for entry, value in enumerate(values) for source in _resolve(value, entry, flag)]


def _resolve(value: str, entry: int, flag: str) -> list[Source]:
    path = os.path.expanduser(value)
    if _exists(path, f"{flag} {value}"):
        if not os.path.isdir(path):
            return [_file_source(path, value if path == value else path, entry, flag)]
        files = _below(path, f"{flag} {value}")
        if not files:
            raise UserError(f"{flag} {value}: is a folder without a file that ends in {ENDINGS}")
        return [_file_source(file, file, entry, flag) for file in files]
    hub = _hub_name(value)
    if hub and hub["split"] and not SPLIT.fullmatch(hub["split"]):
        raise UserError(
            f"{flag} {value}: {hub['split']!r} is not the name of a split; slices and sums of splits are not "
            f"supported, name each split as a value of its own, like {hub['name']}:train"
        )
    if glob.has_magic(path):
        return [_file_source(file, file, entry, flag) for file in _matches(path, f"{flag} {value}")]
    folder = Path(path).absolute().parent
    if hub:
        return _hub_sources(value, hub, entry, f"{flag} {value}", folder)
    raise UserError(f"{flag} {value}: no such file (looked in {folder})")


# ---- files ----


def _exists(path: str, told: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{told}: cannot be read ({error.strerror})") from None
    return True


def split_suffix(path: str) -> tuple[str, str | None] | None:
    """Kind and compression of a file by its name; None for a suffix that is not known."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    elif suffix == ".parquet":
        return "parquet", None
    kind = TEXT_KINDS.get(suffix)
    return (kind, compression) if kind else None


def _file_source(path: str, name: str, entry: int, flag: str) -> Source:
    told = f"{flag} {name}"
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path):
            raise UserError(f"{told}: is not a regular file; name one that ends in {ENDINGS}")
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{told}: cannot be read ({error.strerror})") from None
    kinds = split_suffix(path)
    if kinds is None:
        raise UserError(f"{told}: expected a file that ends in {ENDINGS}")
    if size == 0 and kinds not in PLAIN:  # an empty text is read, and found to hold no conversation
        raise UserError(f"{told}: the file is empty; it should hold at least one conversation")
    return Source(name, Path(path), *kinds, entry)


def _below(folder: str, told: str) -> list[str]:
    """Files of a known suffix below a folder, hidden ones left out. Links to folders are followed once."""
    seen: set[str] = set()
    found: list[str] = []

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise UserError(f"{told}: {error.filename} cannot be read ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in seen
        )
        found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if split_suffix(file))


def _matches(pattern: str, told: str) -> list[str]:
    matched = [file for file in glob.glob(pattern, recursive=True) if not os.path.isdir(file)]
    if not matched:
        raise UserError(f"{told}: no file matches this pattern (looked from {Path.cwd()})")
    known = sorted(file for file in matched if split_suffix(file))
    if not known:
        raise UserError(f"{told}: no file that matches this pattern ends in {ENDINGS}")
    return known


# ---- datasets of the hub ----


def _hub_name(value: str) -> re.Match[str] | None:
    """The parts of a value that can be the name of a dataset, by its looks alone."""
    hub = HUB_NAME.fullmatch(value)
    return None if hub is None or split_suffix(value) else hub


def _hub_sources(value: str, hub: re.Match[str], entry: int, told: str, folder: Path) -> list[Source]:
    # Slow to import, and most runs read files.
    import datasets
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError, XetDownloadError

    split = hub["split"] or "train"
    # Bases of all that the two libraries raise here: OSError of unknown, gated and unreachable datasets, of
    # offline mode and of full disks; ValueError of unknown configurations, splits and malformed names;
    # RuntimeError of datasets that are a script; DatasetsError of files that make no table.
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
            f"{told}: is neither an existing file (looked in {folder}) nor a dataset that could be loaded "
            f"({reason})"
        ) from None
    name = value if hub["split"] else f"{value}:{split}"
    sources, rows = [], 0
    for cached in dataset.cache_files:
        path = Path(cached["filename"])
        sources.append(Source(name, path, "arrow", None, entry, rows_before=rows))
        rows += sum(_batch_sizes(path))
    if not sources:
        raise UserError(f"{told}: the dataset has no rows on disk")
    assert rows == len(dataset), (rows, len(dataset))
    return sources


def _batch_sizes(path: Path) -> Iterator[int]:
    with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as batches:
        yield from (batch.num_rows for batch in batches)
