"""Preparation of files with unusable parts: reported errors, contents of rejected.jsonl, and losses."""

import gzip
import json
import multiprocessing
import resource
import tracemalloc
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.data.conversations.conversation import parse_conversation
from dft.data.preparing.chunk import RecordChunk, encode_chunk
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.reading.records import Record
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from tests.data.rows import numbered

LINES = [json.dumps(row) for row in numbered(5)]
WHOLE = ("\n".join(LINES) + "\n").encode()
MB = 1_000_000


def run(encoder: ChatEncoder, path: Path, mode: str, workers: int = 1) -> PreparedData:
    options = PrepareOptions(max_length=64, on_bad_data=mode)
    return prepare([str(path)], [], encoder, options, cache_dir=path.parent / "cache", workers=workers)


def faults_of(encoder: ChatEncoder, path: Path, mode: str = "error", workers: int = 1) -> list[str]:
    """Return the line and reason of each fault of the file, in order."""
    with pytest.raises(UserError) as caught:
        run(encoder, path, mode, workers)
    return [line.removeprefix(f"  {path}:") for line in str(caught.value).splitlines()[1:]]


def skipped(data: PreparedData) -> list[tuple[int, str]]:
    """Return the line and text of each row of rejected.jsonl."""
    folder = data.path.parent / "out"
    data.write_report(folder)
    return [(row["line"], row["text"]) for row in map(json.loads, (folder / "rejected.jsonl").open())]


def measure_preparation(encoder: ChatEncoder, path: Path, mode: str, connection: Connection) -> None:
    """Send the error message, and the peak memory added in this process and in one of its workers."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        run(encoder, path, mode, workers=2).write_report(path.parent)
        result = ""
    except UserError as error:
        result = str(error)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    connection.send((result, [(resource.getrusage(kind).ru_maxrss - before) << 10 for kind in kinds]))


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_line_of_100_mb_is_reported_or_skipped_with_bounded_memory(encoder, tmp_path, mode):
    row = numbered(1)[0]
    row["messages"][1]["content"] = "The quick brown fox. " * (100 * MB // 21)
    long = json.dumps(row)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([LINES[0], long, *LINES[1:]]))
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure_preparation, args=(encoder, path, mode, there))
    process.start()
    result, (own, of_a_worker) = here.recv()
    process.join()
    reason = (
        "the conversation has 100.1 MB of text; at most 16 MB can be tokenized at once, so split it into "
        "several conversations or take it out"
    )
    if mode == "error":
        assert result == f"1 conversation cannot be used:\n  {path}:2: {reason}"
    else:
        assert result == ""
        (rejected,) = map(json.loads, (tmp_path / "rejected.jsonl").open())
        assert rejected == {"file": str(path), "line": 2, "reason": reason, "text": long}
        report = json.loads((tmp_path / "data_report.json").read_text())
        assert (report["train"]["conversations"], report["rejected"]) == (5, 1)
    assert of_a_worker < 100 * MB
    assert own < 800 * MB


@pytest.mark.parametrize("workers", [1, 2])
def test_long_lines_are_copied_verbatim_and_in_order(encoder, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("dft.data.reading.reader.MAX_TEXT_BYTES", 200)
    monkeypatch.setattr("dft.data.preparing.encode.SMALL", 0)
    content = ["{", "x" * 300, LINES[0], "}", '{"é": "' + "y" * 300 + '"}\r', LINES[1], "z" * 201, "]"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(content).encode())
    data = run(encoder, path, "skip", workers)
    expected = [(number, text) for number, text in enumerate(content, start=1) if text not in LINES]
    assert skipped(data) == expected
    assert [fault.partition(":")[0] for fault in faults_of(encoder, path, workers=workers)] == [
        str(number) for number, _ in expected
    ]


def test_texts_of_long_lines_are_not_in_memory_together(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("dft.data.reading.reader.MAX_TEXT_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([LINES[0], *["x" * MB] * 64]))
    tracemalloc.start()
    try:
        data = run(encoder, path, "skip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.report["rejected"] == 64
    assert peak < 24 * MB


def test_chunk_is_tokenized_in_batches_of_bounded_text(encoder, monkeypatch):
    records = [Record(number, line.encode()) for number, line in enumerate(LINES, start=1)]
    options = PrepareOptions(max_length=64)
    whole = encode_chunk(encoder, options, RecordChunk("a", 0, records))
    sizes = []

    class Noting:
        """The tokenizer, which is no Python object that could be patched."""

        def __getattr__(self, name):
            return getattr(backend, name)

        def encode_batch(self, texts, **options):
            sizes.append(len(texts))
            return backend.encode_batch(texts, **options)

    backend = encoder.backend
    (sequence,) = encoder.render([parse_conversation(LINES[0].encode())])[0]
    monkeypatch.setattr(encoder, "backend", Noting())
    monkeypatch.setattr("dft.data.templates.encoder.BATCH_TEXT", 2 * len(sequence.text))
    parts = encode_chunk(encoder, options, RecordChunk("a", 0, records))
    assert sizes == [2, 2, 1]
    assert parts.input_ids.tolist() == whole.input_ids.tolist()
    assert parts.token_digests.tolist() == whole.token_digests.tolist()


def empty_table() -> bytes:
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([], pa.schema({"messages": pa.list_(turn)})), sink)
    return sink.getvalue().to_pybytes()


ARRAY = "[" + ",\n".join(LINES)
NOTHING = "there is no conversation in this file"


@pytest.mark.parametrize(
    ("name", "raw", "line", "reason", "copied"),
    [
        ("a.jsonl.gz", gzip.compress(WHOLE, mtime=0) + b"garbage", 6,
         "7 bytes after the end of the gzip stream; remove them", "garbage"),
        ("a.json", f"{ARRAY},\n]".encode(), 6, "broken JSON array: expected a value, found ']'", ""),
        ("a.json", ARRAY.encode(), 5, "broken JSON array: the closing ']' is missing", ""),
        ("a.json", f'{{"messages": [{{"ro\n{WHOLE.decode()}'.encode(), 1,
         "broken JSON: Unterminated string starting at (column 16)", '{"messages": [{"ro'),
        ("a.jsonl", b"\xef\xbb\xbf{\r\n" + WHOLE, 1,
         "broken JSON: Expecting property name enclosed in double quotes (column 2)", "\ufeff{\r"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), 1, NOTHING, ""),
        ("a.parquet", empty_table(), 1, NOTHING, ""),
    ],
)  # fmt: skip
def test_part_that_loses_nothing_else_is_reported_or_skipped(
    encoder, tmp_path, name, raw, line, reason, copied
):
    bad = tmp_path / "bad" / name
    bad.parent.mkdir()
    bad.write_bytes(raw)
    assert faults_of(encoder, bad) == [f"{line}: {reason}"]
    (tmp_path / "good.jsonl").write_bytes(WHOLE)
    options = PrepareOptions(max_length=64, on_bad_data="skip")
    files = [str(tmp_path / "good.jsonl"), str(bad)]
    data = prepare(files, [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    of_the_bad_file = 0 if reason == NOTHING else 5
    assert data.report["train"]["conversations"] == 5 + of_the_bad_file
    assert data.report["rejected"] == 1
    assert skipped(data) == [(line, copied)]


@pytest.mark.parametrize(
    ("name", "raw", "line"),
    [
        ("a.jsonl.gz", gzip.compress(WHOLE, mtime=0)[:-20], "3"),
        ("a.jsonl.gz", gzip.compress(WHOLE, mtime=0) + gzip.compress(WHOLE, mtime=0)[:-20], "8"),
        ("a.json", f"{ARRAY[:100]},\n{ARRAY}".encode(), "1"),
        ("a.json", f"{ARRAY}]\n{ARRAY}]".encode(), "6"),
    ],
)
def test_file_that_cannot_be_read_to_its_end_is_always_an_error(encoder, tmp_path, name, raw, line):
    path = tmp_path / name
    path.write_bytes(raw)
    for mode in ("error", "skip"):
        reason = faults_of(encoder, path, mode)[-1]
        assert reason.startswith(f"{line}: ") and reason.endswith("; the rest of the file cannot be read")


def test_table_without_conversation_columns_is_always_an_error(encoder, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", "b"]}), path)
    for mode in ("error", "skip"):
        assert faults_of(encoder, path, mode) == [
            "1: no conversation; the columns are body, expected 'messages', 'conversations', 'conversation', "
            "'instruction' with 'output', 'response' or 'prompt' with 'completion'; --columns NAME=COLUMN "
            "reads a column under another name"
        ]
