"""Preparation of data files into one cached dataset: tokenized, mixed, split and packed.

Prepared data is stored under a key derived from everything that affects its contents (`cache_key`). One
process prepares while the others wait for a file lock. No collective is pending in the meantime, so hours of
tokenizing cannot cause a communication timeout. A killed process leaves only a folder under a temporary name,
which is never read and is removed by a later preparation.
"""

import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from dft.data.batches.dataset import Sequences
from dft.data.conversations.faults import Faults
from dft.data.preparing.cache import DATA_REPORT, check_private, is_complete, remove_abandoned, seal
from dft.data.preparing.cache_key import cache_key
from dft.data.preparing.conversation_counts import ConversationCounts
from dft.data.preparing.data_report import add_file_names, build_report, file_group
from dft.data.preparing.digests import DIGESTS, content_digests
from dft.data.preparing.encode import encode_sources
from dft.data.preparing.encoded_sequences import EncodedSequences
from dft.data.preparing.evaluation_sets import EVAL, parse_evaluation_files, splits_of
from dft.data.preparing.file_rules import assign_rules, check_columns_used
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.selection import select
from dft.data.reading.data_file import DataFile, check_not_data
from dft.data.reading.sources import resolve_sources
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.files import DISK_FULL, convert_write_errors, flush_to_disk, write_atomically

REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class PreparedData:
    """Return value of `prepare`.

    Attributes:
        datasets: "train", and "eval" or, for each named evaluation set, "eval_<name>".
        report: the contents of data_report.json, which accounts for every conversation of the files.
        path: the folder in the cache. Its `train.arrow` holds all sequences of the training files.
        names: names of the "train" and the "eval" files, by file number.
        sources: these files.
    """

    datasets: dict[str, Sequences]
    report: dict[str, Any]
    path: Path
    names: dict[str, list[str]]
    sources: dict[str, list[DataFile]]

    @property
    def evaluation(self) -> Sequences | dict[str, Sequences] | None:
        """What the run evaluates on: one set, several by name, or nothing."""
        if EVAL in self.datasets:
            return self.datasets[EVAL]
        named = {
            split.removeprefix(f"{EVAL}_"): dataset
            for split, dataset in self.datasets.items()
            if split != "train"
        }
        return named or None

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.report[split]["length_percentiles"]["100"] for split in self.datasets)

    def rejected_rows(self) -> list[dict[str, Any]]:
        """Return the rows of rejected.jsonl."""
        return [json.loads(line) for line in self._rejected_lines()]

    def write_report(self, folder: Path) -> None:
        """Write `data_report.json` and, if records were rejected, `rejected.jsonl` to the output directory.

        Raises:
            UserError: the files cannot be written, or one of them is a data file.
        """
        check_report_folder(folder, self.sources)
        with convert_write_errors(folder, "--output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            if self.report["rejected"]:
                write_atomically(folder / REJECTED, self._rejected_lines())
            else:
                (folder / REJECTED).unlink(missing_ok=True)  # left by an earlier run
            write_atomically(folder / DATA_REPORT, [json.dumps(self.report, indent=2, ensure_ascii=False)])

    def _rejected_lines(self) -> Iterator[str]:
        """Yield the lines of rejected.jsonl, with file names in place of file numbers."""
        for group, names in self.names.items():
            path = self.path / f"{group}.{REJECTED}"
            for line in path.open(encoding="utf-8") if path.exists() else ():
                row = json.loads(line)
                yield json.dumps({**row, "file": names[row["file"]]}, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Preparation:
    """The inputs of a preparation; see `prepare`.

    Attributes:
        sources: the "train" and the "eval" files.
        values: the values of the flags that name them.
        eval_splits: for each value of --eval_data_files, the evaluation set that it belongs to.
        contents: content digest of each file, taken before they are read.
    """

    sources: dict[str, list[DataFile]]
    values: dict[str, list[str]]
    eval_splits: list[str]
    contents: list[str]
    encoder: ChatEncoder
    options: PrepareOptions
    workers: int


def prepare(
    data_files: list[str],
    eval_data_files: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    *,
    cache_dir: Path,
    workers: int,
) -> PreparedData:
    """Prepare data files, or load the result from the cache if they were prepared before.

    Args:
        data_files: files, folders, glob patterns or hub datasets, see
            `dft.data.reading.sources.resolve_sources`.
        eval_data_files: the same, or NAME=FILE for several evaluation sets. If not empty, these files are
            used for evaluation instead of a validation split.
        encoder: renders, tokenizes and masks the conversations.
        options: everything else that affects the prepared data.
        cache_dir: folder of the cache, created if it does not exist.
        workers: number of processes that render and tokenize. 0 uses this process, where a chat template that
            never terminates cannot be stopped.

    Raises:
        UserError: a file is missing; there are invalid lines (the first 20 are listed as `file:line: reason`,
            with a total per reason); no conversation is left to train or evaluate on; or the cache folder
            cannot be written, or can be written by other users.
    """
    sets = parse_evaluation_files(eval_data_files)
    values, splits = {"train": data_files, "eval": sets.files}, sets.splits()
    sources = find_sources(values, options)
    with _cache_errors(cache_dir, sources):
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_private(cache_dir / DIGESTS, cache_dir)
        contents = digests_of(sources, cache_dir)
        target = cache_dir / cache_key(sources, contents, encoder, options, splits)
        check_private(target, cache_dir)
        if not is_complete(target):
            preparation = _Preparation(sources, values, splits, contents, encoder, options, workers)
            _prepare_once(target, preparation)
    names = {group: [source.name for source in members] for group, members in sources.items()}
    report = add_file_names(json.loads((target / DATA_REPORT).read_text(encoding="utf-8")), names)
    report["prepared_path"] = str(target)
    datasets = {split: _load_split(target, split, names) for split in splits_of(report)}
    return PreparedData(datasets, report, target, names, sources)


def check_report_folder(folder: Path, sources: dict[str, list[DataFile]]) -> None:
    """Raise `UserError` if the report of the data would replace or remove a data file."""
    for name in (REJECTED, DATA_REPORT):
        for members in sources.values():
            check_not_data(folder / name, f"--output_dir {folder}", members)


def find_sources(values: dict[str, list[str]], options: PrepareOptions) -> dict[str, list[DataFile]]:
    """Return the "train" and the "eval" files with the rules for their rows.

    Args:
        values: the values of --data_files and --eval_data_files without names of sets, by these names.
        options: the flags that make the rules.
    """
    flags = {"train": "--data_files", "eval": "--eval_data_files"}
    sources = {group: resolve_sources(values[group], flag) for group, flag in flags.items()}
    return assign_rules(sources, values, options)


def digests_of(sources: dict[str, list[DataFile]], cache_dir: Path) -> list[str]:
    """Return the content digest of each file."""
    return content_digests([source.path for group in sources.values() for source in group], cache_dir)


@contextmanager
def _cache_errors(cache_dir: Path, sources: dict[str, list[DataFile]]) -> Iterator[None]:
    """Convert errors of reading the data files or writing the cache to `UserError`."""
    data_paths = {str(source.path) for group in sources.values() for source in group}
    with convert_write_errors(cache_dir, "--data_cache_dir"):
        try:
            yield
        except OSError as error:
            if str(error.filename) in data_paths and not isinstance(error, FileExistsError):
                raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
            raise


def _load_split(folder: Path, split: str, names: dict[str, list[str]]) -> Sequences:
    """Return the dataset of a split in a folder of prepared data."""
    group = file_group(split, names)
    offsets = folder / f"{split}.offsets.npy"
    return Sequences(
        folder / f"{group}.arrow",
        np.load(folder / f"{split}.order.npy", mmap_mode="r"),
        np.load(offsets, mmap_mode="r") if offsets.exists() else None,
        names[group],
    )


def _prepare_once(target: Path, preparation: _Preparation) -> None:
    """Fill the folder `target`, unless another process does so while this one waits for the lock.

    If the other process fails, its error is raised here as well.
    """
    started, error_file = time.time(), Path(f"{target}.error")
    with FileLock(f"{target}.lock"):
        if is_complete(target):
            return
        if error_file.is_file() and not error_file.is_symlink() and error_file.stat().st_mtime >= started:
            raise UserError(error_file.read_text(encoding="utf-8", errors="replace"))
        remove_abandoned(target.parent, target.name)
        if target.exists():
            print(f"note        {target} is damaged and will be prepared again", file=sys.stderr, flush=True)
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()
        staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            with _cache_errors(target.parent, preparation.sources):
                _fill_and_seal(staging, preparation)
            staging.rename(target)
            flush_to_disk(target.parent)
        except UserError as error:
            with suppress(OSError):  # the full disk may be this one
                write_atomically(error_file, [str(error)])
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        error_file.unlink(missing_ok=True)


def _fill_and_seal(folder: Path, preparation: _Preparation) -> None:
    """Fill a folder, check that the data files did not change in the meantime, and seal it."""
    try:
        _fill(folder, preparation)
        if digests_of(preparation.sources, folder.parent) != preparation.contents:
            raise UserError(
                "the data files changed while they were being prepared; start again when they are complete"
            )
        seal(folder)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        written = sum(path.stat().st_size for path in folder.iterdir())
        raise UserError(
            f"--data_cache_dir {folder.parent}: no space left on the device after {written:,} bytes of "
            "prepared data, which are removed again; free more than that or choose a folder on another disk"
        ) from None


def _fill(folder: Path, preparation: _Preparation) -> None:
    """Write the sequences, the splits and the report into a folder."""
    sources, options = preparation.sources, preparation.options
    faults, skip = Faults(), options.keep_rejected
    encoded: dict[str, EncodedSequences] = {}
    counts: dict[str, list[ConversationCounts]] = {}
    for group, members in sources.items():
        path = folder / f"{group}.{REJECTED}"
        with open(path, "w", encoding="utf-8") if skip and members else nullcontext() as rejects:
            encoded[group], counts[group] = encode_sources(
                members,
                folder / f"{group}.arrow",
                preparation.encoder,
                options,
                preparation.workers,
                faults,
                rejects,
            )
    faults.raise_if_any()  # applies to "skip" as well: unreadable records cannot be saved
    named = {group: [part.named for part in parts] for group, parts in counts.items()}
    check_columns_used(sources, preparation.values, options, named)
    entries = [source.entry for source in sources["train"]]
    eval_splits = [preparation.eval_splits[source.entry] for source in sources["eval"]]
    splits, unused = select(encoded, counts, entries, options, eval_splits)
    if not sources["eval"]:
        os.unlink(folder / "eval.arrow")
    for name, split in splits.items():
        _save_array(folder / f"{name}.order.npy", split.encoded.rows)
        if split.offsets is not None:
            _save_array(folder / f"{name}.offsets.npy", split.offsets)
    weights = options.data_weights or (1,) * (1 + max(entries))
    report = build_report(splits, counts, unused, options.max_length, [weights[entry] for entry in entries])
    report["options"] = asdict(options)
    (folder / DATA_REPORT).write_text(json.dumps(report), encoding="utf-8")


def _save_array(path: Path, array: np.ndarray) -> None:
    """Save an array. Unlike `np.save`, raises an `OSError` with an errno if the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())
