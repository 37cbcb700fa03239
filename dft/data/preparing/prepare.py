"""Files -> one prepared dataset on disk: tokenized once, mixed, split, packed, cached.

Prepared data is stored under a key of everything that shapes it. One process prepares while the others wait
for a file lock, not in a collective, so no communication time-out can end an hour of tokenizing. One that
is killed leaves only a folder of another name, which nothing reads and a later one removes.
"""

import hashlib
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

import jinja2
import numpy as np
import tokenizers
import transformers
from filelock import FileLock

import dft.data
from dft.data.batches.dataset import Sequences
from dft.data.conversations.faults import Faults
from dft.data.preparing.cache import REPORT, check_private, is_whole, remove_abandoned, seal
from dft.data.preparing.chunk import Totals
from dft.data.preparing.data_report import group_of, named, report_of
from dft.data.preparing.digests import DIGESTS, content_digests
from dft.data.preparing.encode import Encoded, encode_sources
from dft.data.preparing.options import EncodeOptions, PrepareOptions
from dft.data.preparing.selection import select
from dft.data.reading.sources import Source, resolve_sources
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.files import DISK_FULL, convert_write_errors, flush_to_disk, write_atomically

REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` made.

    Attributes:
        datasets: "train" and, if any, "eval".
        report: accounts for every conversation of the files.
        path: the folder in the cache. `train.arrow` in it holds all sequences of the training files.
        names: of the files to train on ("train") and to evaluate on ("eval"), as they are numbered.
    """

    datasets: dict[str, Sequences]
    report: dict[str, Any]
    path: Path
    names: dict[str, list[str]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.report[split]["length_percentiles"]["100"] for split in self.datasets)

    def write_report(self, folder: Path) -> None:
        """`data_report.json` and, if anything was rejected, `rejected.jsonl` into the output directory.

        Raises:
            UserError: they cannot be written there.
        """
        with convert_write_errors(folder, "--output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            if self.report["rejected"]:
                write_atomically(folder / REJECTED, self._rejected_lines())
            else:
                (folder / REJECTED).unlink(missing_ok=True)  # of an earlier run
            write_atomically(folder / REPORT, [json.dumps(self.report, indent=2, ensure_ascii=False)])

    def _rejected_lines(self) -> Iterator[str]:
        for group, names in self.names.items():
            kept = self.path / f"{group}.{REJECTED}"
            for line in kept.open(encoding="utf-8") if kept.exists() else ():
                row = json.loads(line)
                yield json.dumps({**row, "file": names[row["file"]]}, ensure_ascii=False) + "\n"


def prepare(
    data_files: list[str],
    eval_data_files: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    *,
    cache_dir: Path,
    workers: int,
) -> PreparedData:
    """The prepared dataset of these files, from the cache if it was prepared before.

    Args:
        data_files: files, folders, globs or hub datasets, see `dft.data.reading.sources.resolve_sources`.
        eval_data_files: the same; if there are any, they are evaluated on in place of a validation split.
        workers: processes that render and tokenize. With 0 this process does it, and a chat template that
            loops is not ended.

    Raises:
        UserError: missing files, bad lines (the first 20 as `file:line: reason`, with a total per reason),
            nothing left to train or to evaluate on, or a cache folder that cannot be written or that others
            can write.
    """
    sources = {
        "train": resolve_sources(data_files, "--data_files"),
        "eval": resolve_sources(eval_data_files, "--eval_data_files"),
    }
    with _cache_errors(cache_dir, sources):
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_private(cache_dir / DIGESTS, cache_dir)
        contents = contents_of(sources, cache_dir)
        target = cache_dir / cache_key(sources, contents, encoder, options)
        check_private(target, cache_dir)
        if not is_whole(target):
            _prepare_once(target, sources, contents, encoder, options, workers)
    names = {group: [source.name for source in some] for group, some in sources.items()}
    report = named(json.loads((target / REPORT).read_text(encoding="utf-8")), names)
    report["prepared_path"] = str(target)
    datasets = {split: _load(target, split, names) for split in ("train", "eval") if split in report}
    return PreparedData(datasets, report, target, names)


def contents_of(sources: dict[str, list[Source]], cache_dir: Path) -> list[str]:
    """A digest of each file."""
    return content_digests([source.path for group in sources.values() for source in group], cache_dir)


def source_files() -> list[Path]:
    """Returns every Python file whose code decides what prepared data look like.

    These are all files of `dft.data`, sub-folders included, and the modules at the top of `dft` that they
    import. A change to any of them must not reuse data prepared by the earlier code.
    """
    package = Path(dft.data.__file__).parent
    return [*sorted(package.rglob("*.py")), *sorted(package.parent.glob("*.py"))]


def cache_key(
    sources: dict[str, list[Source]], contents: list[str], encoder: ChatEncoder, options: PrepareOptions
) -> str:
    """Changes with one byte of a file, the tokenizer, the template, an option, or the code that encodes."""
    digest = hashlib.blake2b(digest_size=16)
    for path in source_files():
        digest.update(path.read_bytes())
    template = encoder.template
    described = {
        "versions": [transformers.__version__, tokenizers.__version__, jinja2.__version__],
        "options": asdict(options),
        "template": template.source,
        "variables": template.variables,
        "today": str(template.template.today) if template.template.writes_date else None,
        "special_tokens": template.special_tokens,
        "stops": template.stops,
        # How a file is read, not what it is called.
        "files": [
            [(one.kind, one.compression, one.entry, one.rows_before) for one in group]
            for group in sources.values()
        ],
        "contents": contents,
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    digest.update(encoder.backend.to_str().encode())
    return digest.hexdigest()


@contextmanager
def _cache_errors(cache_dir: Path, sources: dict[str, list[Source]]) -> Iterator[None]:
    read = {str(source.path) for group in sources.values() for source in group}
    with convert_write_errors(cache_dir, "--data_cache_dir"):
        try:
            yield
        except OSError as error:
            if str(error.filename) in read and not isinstance(error, FileExistsError):
                raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
            raise


# ---- the folder in the cache ----


def _load(target: Path, split: str, names: dict[str, list[str]]) -> Sequences:
    offsets = target / f"{split}.offsets.npy"
    return Sequences(
        target / f"{group_of(split, names)}.arrow",
        np.load(target / f"{split}.order.npy", mmap_mode="r"),
        np.load(offsets, mmap_mode="r") if offsets.exists() else None,
        names[group_of(split, names)],
    )


def _prepare_once(
    target: Path,
    sources: dict[str, list[Source]],
    contents: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    workers: int,
) -> None:
    """Fills `target`, unless another process does so meanwhile; then its error, if it fails, is ours too."""
    asked, error_file = time.time(), Path(f"{target}.error")
    with FileLock(f"{target}.lock"):
        if is_whole(target):
            return
        if error_file.is_file() and not error_file.is_symlink() and error_file.stat().st_mtime >= asked:
            raise UserError(error_file.read_text(encoding="utf-8", errors="replace"))
        remove_abandoned(target.parent, target.name)
        if target.exists():
            print(f"note        {target} is damaged and prepared anew", file=sys.stderr, flush=True)
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()
        staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            with _cache_errors(target.parent, sources):
                _fill(staging, sources, contents, encoder, options, workers)
            staging.rename(target)
            flush_to_disk(target.parent)
        except UserError as error:
            with suppress(OSError):  # the disk that is full may be this one
                write_atomically(error_file, [str(error)])
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        error_file.unlink(missing_ok=True)


def _fill(
    folder: Path,
    sources: dict[str, list[Source]],
    contents: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    workers: int,
) -> None:
    try:
        _prepare(folder, sources, encoder, options, workers)
        if contents_of(sources, folder.parent) != contents:
            raise UserError(
                "the data files changed while they were prepared; start again once they are written"
            )
        seal(folder)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        written = sum(one.stat().st_size for one in folder.iterdir())
        raise UserError(
            f"--data_cache_dir {folder.parent}: no space left on the device after {written:,} bytes of "
            "prepared data, which are removed again; free more than that or name a folder on another disk"
        ) from None


def _prepare(
    folder: Path,
    sources: dict[str, list[Source]],
    encoder: ChatEncoder,
    options: PrepareOptions,
    workers: int,
) -> None:
    faults, skip = Faults(), options.on_bad_data == "skip"
    encoded: dict[str, Encoded] = {}
    totals: dict[str, list[Totals]] = {}
    how = EncodeOptions(
        options.max_length, options.truncation, options.train_on_last_turn_only, keep_rejected=skip
    )
    for group, some in sources.items():
        kept = folder / f"{group}.{REJECTED}"
        with open(kept, "w", encoding="utf-8") if skip and some else nullcontext() as rejects:
            encoded[group], totals[group] = encode_sources(
                some, folder / f"{group}.arrow", encoder, how, workers, faults, rejects
            )
    faults.raise_if_any()  # also when skipping: what cannot be read cannot be kept either
    entries = [source.entry for source in sources["train"]]
    splits, left_out = select(encoded, totals, entries, options)
    if not sources["eval"]:
        os.unlink(folder / "eval.arrow")
    for name, split in splits.items():
        _save(folder / f"{name}.order.npy", split.encoded.rows)
        if split.offsets is not None:
            _save(folder / f"{name}.offsets.npy", split.offsets)
    weights = options.data_weights or (1,) * (1 + max(entries))
    report = report_of(splits, totals, left_out, options.max_length, [weights[entry] for entry in entries])
    report["options"] = asdict(options)
    (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")


def _save(path: Path, array: np.ndarray) -> None:
    """`np.save`, but a full disk is an error that says so: numpy's own has no number."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())
