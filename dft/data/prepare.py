"""Files -> one prepared dataset on disk: tokenized once, split, cached.

Prepared data is stored under a key of everything that shapes it. One process prepares while the others wait
for a file lock, not in a collective, so no communication time-out can end an hour of tokenizing. One that
is interrupted leaves only a folder of another name, which nothing reads and the next one removes.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from datasets import DatasetDict, load_from_disk
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from filelock import FileLock

from dft.data.accounting import report_of
from dft.data.chat import ChatEncoder
from dft.data.encode import Encoded, Totals, encode_files
from dft.data.faults import Faults
from dft.data.reader import check_files
from dft.errors import UserError

REPORT = "data_report.json"
DATASET = "dataset"


@dataclass(frozen=True)
class PrepareOptions:
    """Everything besides tokenizer and file contents that shapes the prepared data."""

    max_length: int
    validation_split_percentage: float = 0.0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    seed: int = 42


@dataclass(frozen=True)
class PreparedData:
    """`datasets` has "train" and, if any, "eval", columns input_ids and labels; `report` accounts for it."""

    datasets: DatasetDict
    report: dict[str, Any]
    path: Path

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.report[split]["length_percentiles"]["100"] for split in self.datasets)


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

    `eval_data_files`, if any, are evaluated on in place of a validation split.

    Raises:
        UserError: missing files, bad lines (the first 20 as `file:line: reason`, with a total per reason),
            nothing left to train or to evaluate on, or a cache folder that cannot be written.
    """
    check_files(data_files, "--data_files")
    check_files(eval_data_files, "--eval_data_files")
    target = cache_dir / cache_key(data_files, eval_data_files, encoder, options)
    if not target.is_dir():
        with _cache_errors(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(f"{target}.lock"):
                if not target.is_dir():
                    _prepare(target, data_files, eval_data_files, encoder, options, workers)
    report = json.loads((target / REPORT).read_text(encoding="utf-8"))
    # The key knows files by their content, so the names are those of this call.
    names = {"train": data_files, "eval": eval_data_files or data_files}
    for split in names.keys() & report.keys():
        for entry, name in zip(report[split]["files"], dict.fromkeys(names[split]), strict=True):
            entry["file"] = name
    report["prepared_path"] = str(target / DATASET)
    return PreparedData(load_from_disk(str(target / DATASET)), report, target / DATASET)


def cache_key(
    data_files: list[str], eval_data_files: list[str], encoder: ChatEncoder, options: PrepareOptions
) -> str:
    """Changes with one byte of a file, the tokenizer, the template, an option, or the code that encodes."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    template = encoder.template
    described = {
        "versions": [transformers.__version__, tokenizers.__version__],
        "options": asdict(options),
        "template": template.source,
        "special_tokens": template.special_tokens,
        "stops": template.stops,
        # Suffix: it decides how a file is read. Index: files given twice are counted as one.
        "files": [
            [(Path(name).suffix, group.index(name)) for name in group]
            for group in (data_files, eval_data_files)
        ],
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    digest.update(encoder.backend.to_str().encode())
    for name in (*data_files, *eval_data_files):
        content = hashlib.blake2b()
        with open(name, "rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()


@contextmanager
def _cache_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--data_cache_dir {cache_dir}: is not a folder") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"--data_cache_dir {cache_dir}: no space left on the device for the prepared data; name a "
                "folder on another disk"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise UserError(
                f"--data_cache_dir {cache_dir}: cannot be written ({error.strerror}); name another folder"
            ) from None
        raise


def _prepare(
    target: Path,
    data_files: list[str],
    eval_data_files: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    workers: int,
) -> None:
    """Fills `target`, all of it or nothing. To be called under its lock."""
    for left in target.parent.glob(f"{target.name}.*"):
        if left.is_dir():  # of a process that was killed, since nobody else can hold the lock
            shutil.rmtree(left)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        faults = Faults()
        sizes = (encoder, options.max_length, workers, faults)
        train, totals = encode_files(data_files, staging / "train.arrow", *sizes)
        held_out, held_out_totals = encode_files(eval_data_files, staging / "eval.arrow", *sizes)
        faults.raise_if_any()
        if eval_data_files:
            splits, in_train = _without_shared(train, held_out, held_out_totals, options)
        else:
            splits, in_train = _split(train, options), 0
        if not len(splits["train"]):
            raise UserError(_nothing_left("--data_files", totals, options))
        limits = {"train": options.max_train_samples, "eval": options.max_eval_samples}
        splits = {name: _limit(encoded, limits[name], options.seed) for name, encoded in splits.items()}
        with _no_progress_bars():
            datasets = DatasetDict({name: encoded.dataset() for name, encoded in splits.items()})
            datasets.save_to_disk(staging / DATASET)
        report = {**report_of(splits, totals + held_out_totals, in_train), "options": asdict(options)}
        (staging / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
        for name in ("train.arrow", "eval.arrow"):
            os.unlink(staging / name)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Writing what is tokenized takes no time worth a bar."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


# ---- splitting and selecting ----


def _without_shared(
    train: Encoded, held_out: Encoded, totals: Totals, options: PrepareOptions
) -> tuple[dict[str, Encoded], int]:
    """The evaluation files less the conversations that are in the training files, and how many those were."""
    if not len(held_out):
        raise UserError(_nothing_left("--eval_data_files", totals, options))
    shared = np.isin(held_out.keys, train.keys)
    count = len(np.unique(held_out.conversations[shared]))
    if shared.all():
        raise UserError(
            f"--eval_data_files: all {count} conversations are in the training files as well; evaluation "
            "needs conversations the model is not trained on"
        )
    return {"train": train, "eval": held_out.take(~shared)}, count


def _split(train: Encoded, options: PrepareOptions) -> dict[str, Encoded]:
    """Holds out a share of the conversations, at least one. Equal conversations stay on one side together."""
    percentage = options.validation_split_percentage
    if not percentage or not len(train):
        return {"train": train}
    # Numbered by digest: the choice depends on the conversations and the seed, not on the order of the lines.
    different, number = np.unique(train.keys, return_inverse=True)
    count = max(1, round(len(different) * percentage / 100))
    if count >= len(different):
        raise UserError(
            f"--validation_split_percentage {percentage:g}: of {len(different)} different conversations "
            f"{count} would be held out and none left to train on"
        )
    chosen = np.random.default_rng(options.seed).permutation(len(different))[:count]
    held_out = np.isin(number, chosen)
    return {"train": train.take(~held_out), "eval": train.take(held_out)}


def _limit(encoded: Encoded, count: int | None, seed: int) -> Encoded:
    """That many sequences, drawn at random and kept in order; all of them if there are no more."""
    if count is None or count >= len(encoded):
        return encoded
    return encoded.take(np.sort(np.random.default_rng(seed).permutation(len(encoded))[:count]))


def _nothing_left(flag: str, totals: Totals, options: PrepareOptions) -> str:
    return (
        f"{flag}: nothing is left of {totals.conversations.total()} conversations, none has a supervised "
        f"token within --max_length {options.max_length}; raise it"
    )
