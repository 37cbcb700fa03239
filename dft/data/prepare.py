"""Files -> one prepared dataset on disk: read, check, tokenize in parallel, split, cache.

Prepared data is stored once per machine under a key of everything that shapes it. One process prepares while
the others wait for a file lock, not in a collective, so no communication time-out can end an hour of
tokenizing. A preparation that is interrupted leaves only a temporary folder that nothing reads.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars, load_from_disk
from filelock import FileLock
from tqdm import tqdm

from dft.constants import IGNORE_INDEX
from dft.data.chat import ChatEncoder
from dft.data.reader import BadLine, Record, check_files, parse_messages, read_records
from dft.errors import UserError

CHUNK = 256
"""Conversations a worker gets at a time: enough to feed the tokenizer's batch call, small enough to balance."""
LISTED = 20
"""Bad lines that an error lists before it only counts."""
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
REPORT = "data_report.json"


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
    """`datasets` has "train" and, if any, "eval", with columns input_ids and labels; `report` accounts for it."""

    datasets: DatasetDict
    report: dict[str, Any]
    path: Path


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

    Raises:
        UserError: missing files, bad lines (the first 20 as `file:line: reason`, with a total per reason), or
            nothing left to train on.
    """
    check_files(data_files, "--data_files")
    check_files(eval_data_files, "--eval_data_files")
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = cache_dir / cache_key(data_files, eval_data_files, encoder, options)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache_dir))
            try:
                _prepare_into(staging, data_files, eval_data_files, encoder, options, workers)
                staging.rename(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    report = json.loads((target / REPORT).read_text())
    report["prepared_path"] = str(target / "dataset")
    return PreparedData(load_from_disk(str(target / "dataset")), report, target / "dataset")


def cache_key(
    data_files: list[str], eval_data_files: list[str], encoder: ChatEncoder, options: PrepareOptions
) -> str:
    """Changes with one byte of a file, of the tokenizer, the template, an option, or of the code that encodes."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for group in (data_files, eval_data_files):
        for name in group:
            digest.update(str(Path(name).absolute()).encode())
            with open(name, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        digest.update(b"\0")
    described = [asdict(options), encoder.template, sorted(encoder.stops), encoder.tokenizer.special_tokens_map]
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    digest.update(encoder.backend.to_str().encode())
    return digest.hexdigest()


def _prepare_into(
    folder: Path,
    data_files: list[str],
    eval_data_files: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    workers: int,
) -> None:
    faults = Faults()
    train = _encode_files(data_files, folder / "train.arrow", encoder, options.max_length, workers, faults)
    held_out = _encode_files(eval_data_files, folder / "eval.arrow", encoder, options.max_length, workers, faults)
    faults.raise_if_any()

    overlap = 0
    if eval_data_files:
        known = set(train.keys)
        keep = np.array([key not in known for key in held_out.keys], dtype=bool)
        overlap = len({key for key in held_out.keys if key in known})
        if not keep.any():
            raise UserError(
                f"--eval_data_files: all {overlap} conversations are in the training files as well; "
                "evaluation needs conversations the model is not trained on"
            )
        splits = {"train": train, "eval": held_out.where(keep)}
    elif options.validation_split_percentage > 0:
        chosen = _validation_keys(train.keys, options)
        is_eval = np.array([key in chosen for key in train.keys], dtype=bool)
        splits = {"train": train.where(~is_eval), "eval": train.where(is_eval)}
    else:
        splits = {"train": train}
    limits = {"train": options.max_train_samples, "eval": options.max_eval_samples}
    splits = {name: _limit(encoded, limits[name], options.seed) for name, encoded in splits.items()}
    if not len(splits["train"]):
        raise UserError(
            f"--data_files: no conversation is left to train on ({train.dropped} had no supervised token within "
            f"--max_length {options.max_length}; {train.conversations} conversations were read)"
        )

    disable_progress_bars()  # writing what is tokenized takes no time worth a bar
    DatasetDict({name: encoded.dataset() for name, encoded in splits.items()}).save_to_disk(folder / "dataset")
    enable_progress_bars()
    report = _report(splits, {"train": train, "eval": held_out}, options, overlap)
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False))
    for name in ("train.arrow", "eval.arrow"):
        (folder / name).unlink()


# ---- encoding ------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """Sequences of some files on disk, with what is needed to select and to account for them.

    `rows` picks from the Arrow file; `keys` (one per row) identify the conversation a sequence comes from by
    its content, `sources` its file, `lengths` and `supervised` count tokens.
    """

    path: Path
    files: list[str]
    rows: np.ndarray
    keys: list[bytes]
    sources: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    conversations: int = 0
    dropped: int = 0
    truncated: int = 0
    truncated_supervised: int = 0
    endings: Counter[str | None] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, keep: np.ndarray) -> "Encoded":
        """The rows under a boolean mask or at given indices."""
        index = np.flatnonzero(keep) if keep.dtype == bool else keep
        return Encoded(
            self.path, self.files, self.rows[index], [self.keys[i] for i in index], self.sources[index],
            self.lengths[index], self.supervised[index],
        )  # fmt: skip

    def dataset(self) -> Dataset:
        whole = Dataset.from_file(str(self.path))
        return whole if len(self.rows) == len(whole) else whole.select(self.rows)


@dataclass(frozen=True)
class Chunk:
    """What a worker makes of up to `CHUNK` records. Token ids and labels of all sequences lie end to end."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    keys: list[bytes]
    sources: list[str]
    bad: list[tuple[str, str]]
    conversations: int
    dropped: int
    truncated: int
    truncated_supervised: int
    endings: Counter[str | None]


def encode_chunk(encoder: ChatEncoder, records: list[Record], max_length: int) -> Chunk:
    """Parses, renders, tokenizes, masks and truncates a few conversations."""
    bad: list[tuple[str, str]] = []
    good: list[tuple[Record, list[dict[str, Any]]]] = []
    for record in records:
        try:
            good.append((record, parse_messages(record)))
        except BadLine as reason:
            bad.append((record.where, str(reason)))
    ids: list[int] = []
    labels: list[int] = []
    lengths, keys, sources = [], [], []
    counts: Counter[str] = Counter()
    endings: Counter[str | None] = Counter()
    for (record, messages), examples in zip(good, encoder.encode([one for _, one in good]), strict=True):
        if isinstance(examples, BadLine):
            bad.append((record.where, str(examples)))
            continue
        key = conversation_key(messages)
        kept = 0
        cut_supervised = 0
        for example in examples:
            inside = example.labels[:max_length]
            cut_supervised += sum(label != IGNORE_INDEX for label in example.labels[max_length:])
            if all(label == IGNORE_INDEX for label in inside):
                continue
            kept += 1
            ids += example.input_ids[:max_length]
            labels += inside
            lengths.append(len(inside))
            keys.append(key)
            sources.append(record.file)
            endings.update(example.endings)
        counts["dropped"] += kept == 0
        counts["truncated"] += any(len(example.input_ids) > max_length for example in examples)
        counts["truncated_supervised"] += cut_supervised
    return Chunk(
        np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), np.array(lengths, dtype=np.int32),
        keys, sources, bad, len(good), counts["dropped"], counts["truncated"], counts["truncated_supervised"],
        endings,
    )  # fmt: skip


def conversation_key(messages: list[dict[str, Any]]) -> bytes:
    """Equal for conversations of equal content, whatever file they stand in."""
    return hashlib.blake2b(json.dumps(messages, sort_keys=True).encode(), digest_size=16).digest()


def _encode_files(
    files: list[str], path: Path, encoder: ChatEncoder, max_length: int, workers: int, faults: "Faults"
) -> Encoded:
    keys: list[bytes] = []
    sources: list[int] = []
    lengths: list[np.ndarray] = []
    supervised: list[np.ndarray] = []
    totals: Counter[str] = Counter()
    endings: Counter[str | None] = Counter()
    numbers = {name: index for index, name in enumerate(files)}
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for chunk in _encoded_chunks(files, encoder, max_length, workers):
            faults.add(chunk.bad)
            for name in ("conversations", "dropped", "truncated", "truncated_supervised"):
                totals[name] += getattr(chunk, name)
            endings.update(chunk.endings)
            if len(chunk.lengths):
                offsets = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32)
                columns = [pa.ListArray.from_arrays(offsets, values) for values in (chunk.input_ids, chunk.labels)]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
                keys += chunk.keys
                sources += [numbers[name] for name in chunk.sources]
                lengths.append(chunk.lengths)
                supervised.append(np.add.reduceat(chunk.labels != IGNORE_INDEX, offsets[:-1]))
    flat = [np.concatenate(one) if one else np.zeros(0, np.int64) for one in (lengths, supervised)]
    return Encoded(
        path, files, np.arange(len(keys)), keys, np.array(sources, dtype=np.int64), *flat, **totals, endings=endings
    )


def _encoded_chunks(files: list[str], encoder: ChatEncoder, max_length: int, workers: int) -> Iterator[Chunk]:
    """Chunks in the order of the files, with a bar over the bytes read."""
    records = (record for name in files for record in read_records(name))
    batches = iter(lambda: list(islice(records, CHUNK)), [])
    size = sum(os.path.getsize(name) for name in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None, leave=False) as bar:
        if workers <= 1 or size < 1 << 20:  # starting processes costs more than a megabyte of text
            for batch in batches:
                bar.update(sum(len(record.text) for record in batch))
                yield encode_chunk(encoder, batch, max_length)
            return
        # fork shares the loaded tokenizer; the children run no torch and no threads of the parent.
        context = multiprocessing.get_context("fork")
        initial = (encoder, max_length)
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=initial) as pool:
            try:
                for batch, chunk in _in_order(pool, batches, ahead=4 * workers):
                    bar.update(sum(len(record.text) for record in batch))
                    yield chunk
            except BrokenProcessPool:
                raise UserError(
                    "a tokenizing process was killed, most likely for lack of memory; "
                    f"lower --preprocessing_num_workers (now {workers})"
                ) from None


def _in_order(
    pool: Executor, batches: Iterable[list[Record]], ahead: int
) -> Iterator[tuple[list[Record], Chunk]]:
    """Like `pool.map`, but never more than `ahead` batches in memory."""
    waiting: deque[tuple[list[Record], Future[Chunk]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_work, batch)))
        if len(waiting) >= ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


_worker: tuple[ChatEncoder, int]


def _start_worker(encoder: ChatEncoder, max_length: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism here
    _worker = (encoder, max_length)


def _work(records: list[Record]) -> Chunk:
    encoder, max_length = _worker
    return encode_chunk(encoder, records, max_length)


# ---- splitting and accounting --------------------------------------------------------------------------------


def _validation_keys(keys: list[bytes], options: PrepareOptions) -> set[bytes]:
    """Conversations to hold out, at least one. Repeated conversations go to the same side together."""
    unique = list(dict.fromkeys(keys))
    wanted = max(1, round(len(unique) * options.validation_split_percentage / 100))
    if wanted >= len(unique):
        raise UserError(
            f"--validation_split_percentage {options.validation_split_percentage:g}: of {len(unique)} different "
            f"conversations {wanted} would be held out and none left to train on"
        )
    chosen = np.random.default_rng(options.seed).permutation(len(unique))[:wanted]
    return {unique[index] for index in chosen}


def _limit(encoded: Encoded, count: int | None, seed: int) -> Encoded:
    if count is None or count >= len(encoded):
        return encoded
    chosen = np.random.default_rng(seed).permutation(len(encoded))[:count]
    return encoded.where(np.sort(chosen))


def _report(
    splits: dict[str, Encoded], read: dict[str, Encoded], options: PrepareOptions, overlap: int
) -> dict[str, Any]:
    endings = Counter(read["train"].endings) + Counter(read["eval"].endings)
    total = {
        name: sum(getattr(encoded, name) for encoded in read.values())
        for name in ("conversations", "dropped", "truncated", "truncated_supervised")
    }
    return {
        "conversations_read": total["conversations"],
        "dropped_without_supervised_tokens": total["dropped"],
        "truncated_conversations": total["truncated"],
        "truncated_supervised_tokens": total["truncated_supervised"],
        "eval_conversations_dropped_because_in_train": overlap,
        "turns_without_stop_token": endings.pop(None, 0),
        "end_of_turn_tokens": dict(endings.most_common()),
        **{name: _split_report(encoded) for name, encoded in splits.items()},
        "options": asdict(options),
    }


def _split_report(encoded: Encoded) -> dict[str, Any]:
    def counts(chosen: np.ndarray | slice) -> dict[str, int]:
        lengths = encoded.lengths[chosen]
        return {
            "sequences": len(lengths),
            "tokens": int(lengths.sum()),
            "supervised_tokens": int(encoded.supervised[chosen].sum()),
        }

    percentiles = (0, 50, 90, 99, 100)
    values = np.percentile(encoded.lengths, percentiles) if len(encoded) else [0] * len(percentiles)
    return {
        "conversations": len(set(encoded.keys)),
        **counts(slice(None)),
        "length_percentiles": {str(at): int(value) for at, value in zip(percentiles, values, strict=True)},
        "files": {
            name: counts(encoded.sources == number) for number, name in enumerate(encoded.files)
        },
    }


class Faults:
    """Bad lines of all files, told in one error."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.reasons: Counter[str] = Counter()

    def add(self, bad: list[tuple[str, str]]) -> None:
        for where, reason in bad:
            if len(self.listed) < LISTED:
                self.listed.append(f"{where}: {reason}")
            self.reasons[reason.split(":")[0]] += 1

    def raise_if_any(self) -> None:
        total = self.reasons.total()
        if not total:
            return
        lines = [f"{total} conversation{'s' * (total > 1)} cannot be used:", *(f"  {one}" for one in self.listed)]
        if total > len(self.listed):
            lines.append(f"  ... and {total - len(self.listed)} more")
            lines += [f"  {count} x {reason}" for reason, count in self.reasons.most_common()]
        raise UserError("\n".join(lines))
