"""Records of text files and tables: their lines, their texts, and what cannot be read."""

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.data.conversations.faults import Fault, Faults
from dft.data.reading import decompress, json_array, text_format
from dft.data.reading import text as text_reader
from dft.data.reading.data_file import DataFile, split_suffix
from dft.data.reading.reader import read_batches
from dft.data.reading.records import MAX_TEXT_BYTES, Batch, Flaw, Record
from dft.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LINE = json.dumps({"messages": TURNS})
NOTHING = "there is no conversation in this file"
NOT_UTF8 = Flaw("not valid UTF-8 (invalid start byte at byte 0 of a string)", "not valid UTF-8")
MORE = "the rest of the file cannot be read"
FORMS = (
    "'messages', 'conversations', 'conversation', 'instruction' with 'output', 'response' or 'prompt' with "
    "'completion'; --columns NAME=COLUMN reads a column under another name"
)
TOO_LONG = "longer than 256 MiB, too long to be copied; take it out of the file"
MiB = 1 << 20


def source(path: Path, rows_before: int = 0) -> DataFile:
    kind, compression = ("arrow", None) if path.suffix == ".arrow" else split_suffix(str(path))
    return DataFile(str(path), path, kind, compression, 0, rows_before)


def batches(folder: Path, name: str, content: str | bytes) -> list[Batch]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_batches(source(path)))


def records(folder: Path, name: str, content: str | bytes) -> list[Record]:
    return [record for batch in batches(folder, name, content) for record in batch.records]


def outcomes(folder: Path, name: str, content: str | bytes) -> list[tuple[int, str]]:
    """Return the line of every record with its text, or with the reason why it cannot be used."""
    return [
        (record.line, record.flaw.reason if record.flaw else record.text.decode())
        for record in records(folder, name, content)
    ]


def zstd(*frames: bytes) -> bytes:
    return b"".join(pa.compress(frame, "zstd", asbytes=True) for frame in frames)


def test_lines_are_verbatim_and_blank_lines_are_skipped(tmp_path):
    content = f"\ufeff{LINE}\r\n\r\n  \n {LINE} \n\n{LINE}"
    expected = [(1, f"\ufeff{LINE}\r"), (4, f" {LINE} "), (6, LINE)]
    assert outcomes(tmp_path, "a.jsonl", content) == expected
    assert outcomes(tmp_path, "a.json", content) == expected


def test_lines_are_not_parsed(tmp_path):
    lines = [b"{", b"\0\0", b'{"m": "\xff"}', b'"text"', b"3", LINE.encode()[:-9]]
    all_records = records(tmp_path, "a.jsonl", b"\n".join(lines))
    assert all_records == [Record(number, line) for number, line in enumerate(lines, start=1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n \r\n\t\n"), ("a.json", "[]"), ("a.json", " [ \n] "), ("a.json", "\n\n"),
        ("a.jsonl", "[]\n"), ("a.jsonl", "\ufeff"), ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json.gz", gzip.compress(b"[]", mtime=0)), ("a.jsonl.zst", zstd(b"\n\n")),
    ],
)  # fmt: skip
def test_file_without_conversations_is_a_flaw(tmp_path, name, content):
    assert outcomes(tmp_path, name, content) == [(1, NOTHING)]


def test_missing_file_is_a_flaw(tmp_path):
    (batch,) = read_batches(source(tmp_path / "gone.jsonl"))
    flaw = Flaw(f"cannot be read (No such file or directory); {MORE}", "cannot be read", skippable=False)
    assert batch.records == [Record(1, b"", flaw)]


def test_a_json_file_may_hold_lines(tmp_path):
    # A complete line with an error inside does not make the file a single object.
    for first in (LINE, "3", "{'a': 1}", '{"a": "}"}'):
        assert outcomes(tmp_path, "a.json", f"\n{first}\n{{\n{LINE}") == [(2, first), (3, "{"), (4, LINE)]


def test_a_json_file_may_hold_one_object_over_several_lines(tmp_path):
    pretty = json.dumps({"messages": TURNS}, indent=2)
    assert outcomes(tmp_path, "a.json", pretty) == [(1, pretty)]
    assert outcomes(tmp_path, "a.json", f"\ufeff\n \n{pretty}\n") == [(3, pretty)]
    assert outcomes(tmp_path, "a.json", pretty[:-3]) == [(1, pretty[:-3].rstrip())]
    assert outcomes(tmp_path, "a.json", f"{pretty}\n{pretty}") == [(1, f"{pretty}\n{pretty}")]


def test_a_jsonl_file_that_begins_with_a_bracket_is_an_array_or_lines_of_arrays(tmp_path):
    assert outcomes(tmp_path, "a.jsonl", f"[{LINE}, {LINE}]\n") == [(1, LINE), (1, LINE)]
    assert outcomes(tmp_path, "a.jsonl", f"[{LINE},\n{LINE}]") == [(1, LINE), (2, LINE)]
    assert outcomes(tmp_path, "a.jsonl", f"[1]\n{LINE}\n[2]") == [(1, "[1]"), (2, LINE), (3, "[2]")]
    assert outcomes(tmp_path, "a.jsonl", "[1]") == [(1, "1")]
    after = f"broken JSON array: text after the closing ']'; {MORE}"
    assert outcomes(tmp_path, "a.json", f"[1]\n{LINE}") == [(1, "1"), (2, after)]


def test_format_is_detected_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(decompress, "READ_SIZE", 3)
    pretty = json.dumps({"messages": TURNS}, indent=2)
    assert outcomes(tmp_path, "a.json", f"\n\n\n\n\n{pretty}\n") == [(6, pretty)]
    assert outcomes(tmp_path, "a.json", f"\n\n{LINE}\n{LINE}") == [(3, LINE), (4, LINE)]
    assert outcomes(tmp_path, "a.jsonl", f"\n\n[1]\n\n\n\n{LINE}") == [(3, "[1]"), (7, LINE)]
    assert outcomes(tmp_path, "a.jsonl", "\n\n\n\n[1\n]") == [(5, "1")]


def test_json_lines_whose_first_line_is_truncated_are_read_as_lines(tmp_path):
    for truncated in (LINE[:-1], LINE[:-9], LINE[:30], '{"messages": ['):
        assert outcomes(tmp_path, "a.json", f"\ufeff\n{truncated}\n3\n{LINE}\n") == [
            (2, truncated),
            (3, "3"),
            (4, LINE),
        ]


def test_object_over_several_lines_is_one_record_even_if_a_line_is_an_object(tmp_path):
    turn = '{"role": "user", "content": "q"}'
    whole = f'{{"messages": [\n{turn},\n{turn}\n]}}'
    broken = whole.replace(",\n", "\n")
    nested = f'{{"data": [\n{LINE},\n{LINE}\n]}}'
    for text in (whole, broken, nested):
        assert outcomes(tmp_path, "a.json", text) == [(1, text)]


def test_array_elements_have_the_line_on_which_they_begin(tmp_path):
    pretty = json.dumps({"messages": TURNS, "n": 10**18}, indent=1)
    array = f"\ufeff \n[\n{pretty},\n\n{LINE}, {LINE}\n,\r\n\t{{}}\n]\n"
    line = 3 + pretty.count("\n") + 2
    expected = [(3, pretty), (line, LINE), (line, LINE), (line + 2, "{}")]
    for name in ("a.json", "a.jsonl"):
        assert outcomes(tmp_path, name, array) == expected


def test_array_elements_are_not_parsed(tmp_path):
    elements = [
        "1", "null", '"a, b ] }"', "[1, [2, 3]]", "[]", "{}", '{"a": NaN}', "{'a': 1}", '{"a": "\\\\"}',
        r'{"a": "\"]},[{"}', r'{"a\\\"": "\u007b\\\\\\"}', '{"a" 1,,}', "{]", "x y", '"é😀"', "9" * 5000,
        LINE,
    ]  # fmt: skip
    expected = [(number, element) for number, element in enumerate(elements, start=2)]
    assert outcomes(tmp_path, "a.json", "[\n" + ",\n".join(elements) + "\n]") == expected
    assert outcomes(tmp_path, "a.json", f"[{','.join(elements)}]") == [(1, text) for _, text in expected]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_pieces_may_be_split_anywhere(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(decompress, "READ_SIZE", piece)
    chance = random.Random(piece)
    alphabet = ['"', "\\", "[", "]", "{", "}", ",", ":", "\n", " ", "a", "é", "😀"]
    for _ in range(60):
        texts = ["".join(chance.choices(alphabet, k=chance.randrange(12))) for _ in range(6)]
        values = [chance.choice([text, {text: [text, {"b": text}]}, [[], text], len(text)]) for text in texts]
        elements = [
            json.dumps(value, indent=chance.choice([None, 1]), ensure_ascii=False) for value in values
        ]
        gaps = [chance.choice(["", " ", "\n", "\r\n\t"]) for _ in range(7)]
        array = "[" + ",".join(gap + element for gap, element in zip(gaps, elements, strict=False)) + "\n]\n"
        expected, position = [], 0
        for gap, element in zip(gaps, elements, strict=False):
            position += 1 + len(gap)
            expected.append((array.count("\n", 0, position) + 1, element))
            position += len(element)
        assert outcomes(tmp_path, "a.json", array) == expected


@pytest.mark.parametrize(
    ("array", "line", "reason"),
    [
        (f"[{LINE},\n{LINE}", 2, "the closing ']' is missing"),
        (f"[{LINE},\n\n", 3, "the closing ']' is missing"),
        (f"[{LINE}\n\n{LINE}]", 3, f"expected ',' or ']' after an element; {MORE}"),
        (f"[{LINE},\n]", 2, "expected a value, found ']'"),
        (f"[{LINE}]\n\n[]", 3, f"text after the closing ']'; {MORE}"),
        (f"[{LINE},\n\n\n{LINE[:-1]},\n{LINE}\n]", 4, f"the element that begins here does not end; {MORE}"),
        (f"[{LINE},\n\n{LINE}}}\n]", 3, f"unexpected '}}'; {MORE}"),
        (f'[{LINE},\n{{"a": "b\nc"}}]', 2, f"a string continues past the end of its line; {MORE}"),
        (f'[{LINE},\n\n{{"a": "b]', 3, f"the element that begins here does not end; {MORE}"),
    ],
)
@pytest.mark.parametrize("piece", [5, 1 << 18])
def test_broken_array_is_reported_at_the_line_of_the_error(tmp_path, monkeypatch, array, line, reason, piece):
    monkeypatch.setattr(decompress, "READ_SIZE", piece)
    result = outcomes(tmp_path, "a.json", array)
    assert result[0] == (1, LINE)
    assert result[-1] == (line, f"broken JSON array: {reason}")


def test_missing_array_element_is_reported_and_the_others_are_read(tmp_path):
    assert outcomes(tmp_path, "a.json", "[,\n1,\n,2]") == [
        (1, "broken JSON array: expected a value, found ','"),
        (2, "1"),
        (3, "broken JSON array: expected a value, found ','"),
        (3, "2"),
    ]


def test_arrays_may_be_nested_to_any_depth(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    assert outcomes(tmp_path, "a.json", f"[{deep}]") == [(1, deep)]
    assert outcomes(tmp_path, "a.json", "[" * 100_000) == [
        (1, f"broken JSON array: the element that begins here does not end; {MORE}")
    ]


def test_batches_have_at_most_256_records_and_count_all_bytes(tmp_path):
    all_batches = batches(tmp_path, "a.jsonl", f"{LINE}\n" * 5000)
    assert [len(batch.records) for batch in all_batches] == [256] * 19 + [136]
    assert sum(batch.consumed for batch in all_batches) == 5000 * (len(LINE) + 1)
    all_batches = batches(tmp_path, "a.json", f"[{','.join([LINE] * 600)}]")
    assert [len(batch.records) for batch in all_batches] == [256, 256, 88]
    assert [record.line for batch in all_batches for record in batch.records] == [1] * 600


def test_batches_have_about_4_mib_of_text(tmp_path):
    sizes = [MiB, MiB, MiB, 2 * MiB, 5 * MiB, 10, 10]
    all_batches = batches(tmp_path, "a.jsonl", b"\n".join(b"x" * size for size in sizes))
    lengths = [[len(record.text) for record in batch.records] for batch in all_batches]
    assert lengths == [[MiB] * 3, [2 * MiB], [5 * MiB], [10, 10]]


def test_records_that_are_too_long_are_reported_and_the_others_are_read(tmp_path, monkeypatch):
    for module in (text_reader, text_format, json_array):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    fits, long = f'["{"x" * 996}"]', f'["{"x" * 997}"]'
    for piece in (100, 999):
        monkeypatch.setattr(decompress, "READ_SIZE", piece)
        lines = [(1, fits), (2, TOO_LONG), (3, fits)]
        assert outcomes(tmp_path, "a.jsonl.gz", gzip.compress(f"{fits}\n{long}\n{fits}".encode())) == lines
        assert outcomes(tmp_path, "a.jsonl", f"{fits}\n{fits}\n{long}")[2] == (3, TOO_LONG)
        assert outcomes(tmp_path, "a.json", f"[{fits},\n{long},\n{fits}]") == lines
    assert outcomes(tmp_path, "a.json", "{\n" + " " * 1000 + "}") == [(1, TOO_LONG)]


def peak_of(read: Callable[[], None]) -> int:
    """Return the peak of the bytes that Python and numpy allocate."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = '{"messages": [{"role": "user", "content": "' + 'x, \\n \\"y\\" ' * 5000 + '"}]}'
    count = 200 * MiB // len(row)
    with (tmp_path / name).open("w") as file:
        file.write("[" if name == "a.json" else "")
        for number in range(count):
            file.write(row + (",\n" if name == "a.json" and number < count - 1 else "\n"))
        file.write("]" if name == "a.json" else "")
    counted = []
    peak = peak_of(lambda: counted.append(sum(len(b.records) for b in read_batches(source(tmp_path / name)))))
    assert counted == [count]
    assert peak < 32 * MiB


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_record_of_100_mb_is_read_whole_and_has_too_much_text(tmp_path, name):
    row = b'{"messages": "' + b"x, \\n " * (100_000_000 // 6) + b'"}'
    content = b"[" + row + b",\n" + row + b"]" if name == "a.json" else row + b"\n" + row
    all_batches = batches(tmp_path, name, content)
    assert [[(record.line, record.text == row) for record in batch.records] for batch in all_batches] == [
        [(1, True)], [(2, True)],
    ]  # fmt: skip
    flaw = Flaw(
        "the conversation has 100.1 MB of text; at most 16 MB can be tokenized at once, so split it into "
        "several conversations or take it out",
        "too much text in one conversation",
    )
    assert [record.flaw for batch in all_batches for record in batch.records] == [flaw, flaw]


def test_largest_accepted_record_has_no_flaw(tmp_path):
    largest = b"x" * MAX_TEXT_BYTES
    all_records = records(tmp_path, "a.jsonl", largest + b"\n" + largest + b"x")
    assert all_records[0] == Record(1, largest)
    assert all_records[1].flaw.reason.startswith("the conversation has 16.1 MB of text; at most 16 MB")


def test_compressed_files_may_have_several_members(tmp_path):
    first, second = f"{LINE}\n{LINE[:9]}".encode(), f"{LINE[9:]}\n{LINE}".encode()
    expected = [(1, LINE), (2, LINE), (3, LINE)]
    assert outcomes(tmp_path, "a.jsonl.gz", gzip.compress(first) + gzip.compress(second)) == expected
    assert outcomes(tmp_path, "a.jsonl.zst", zstd(first, b"", second)) == expected
    array = f"[{LINE},\n{LINE}]".encode()
    assert outcomes(tmp_path, "a.json.gz", gzip.compress(array)) == expected[:2]
    assert outcomes(tmp_path, "a.json.zst", zstd(array)) == expected[:2]


def noise(count: int) -> list[str]:
    """Return lines that hardly compress."""
    chance = random.Random(0)
    return [f'{{"messages": "{chance.randbytes(300).hex()}"}}' for _ in range(count)]


@pytest.mark.parametrize(
    ("suffix", "compress", "reason"),
    [
        ("gz", gzip.compress, "its end marker is missing"),
        ("zst", zstd, "Truncated compressed stream"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_truncated_stream_gives_its_whole_lines_and_the_line_of_the_damage(
    tmp_path, name, suffix, compress, reason
):
    lines = noise(3000)
    content = "\n".join(lines) if name == "a.jsonl" else "[" + ",\n".join(lines) + "]"
    raw = compress(content.encode())
    result = outcomes(tmp_path, f"{name}.{suffix}", raw[: len(raw) // 2])
    *good, (line, fault) = result
    assert 1300 < len(good) < 1500
    assert good == [(number, text) for number, text in enumerate(lines[: len(good)], start=1)]
    kind = {"gz": "gzip", "zst": "zstd"}[suffix]
    assert (line, fault) == (len(good) + 1, f"the {kind} stream is damaged or truncated ({reason}); {MORE}")


def test_invalid_streams_are_flaws(tmp_path):
    assert outcomes(tmp_path, "a.jsonl.gz", LINE) == [
        (
            1,
            "the gzip stream is damaged or truncated (Error -3 while decompressing data: incorrect header "
            f"check); {MORE}",
        )
    ]
    reason = "ZSTD decompress failed: Unknown frame descriptor"
    assert outcomes(tmp_path, "a.json.zst", LINE) == [
        (1, f"the zstd stream is damaged or truncated ({reason}); {MORE}")
    ]
    damaged = bytearray(gzip.compress("\n".join(noise(3000)).encode()))
    damaged[-6] ^= 1
    *good, (line, fault) = outcomes(tmp_path, "a.jsonl.gz", bytes(damaged))
    assert 2970 < len(good) < 3000 and line == len(good) + 1
    assert "(Error -3 while decompressing data: incorrect data check)" in fault


@pytest.mark.parametrize("trailing", [b"garbage", b"\0g", b"\x1f", b"\x1fg", LINE.encode(), b"g" * 9000])
def test_bytes_after_a_gzip_stream_are_a_record_of_their_own(tmp_path, trailing):
    kind = "bytes after the end of the gzip stream"
    flawed = trailing.lstrip(b"\0")
    flaw = Flaw(f"{len(flawed):,} {kind}; remove them", kind)
    for content in (f"{LINE}\n{LINE}\n", f"{LINE}\n{LINE}"):
        all_records = records(tmp_path, "a.jsonl.gz", gzip.compress(content.encode()) + trailing)
        assert all_records == [Record(1, LINE.encode()), Record(2, LINE.encode()), Record(3, flawed, flaw)]
    all_records = records(tmp_path, "a.json.gz", gzip.compress(f"[{LINE},\n{LINE}]\n".encode()) + trailing)
    assert all_records == [Record(1, LINE.encode()), Record(2, LINE.encode()), Record(3, flawed, flaw)]


def test_truncated_second_gzip_member_is_not_taken_as_trailing_bytes(tmp_path):
    raw = gzip.compress(f"{LINE}\n".encode())
    for cut in (2, 3, 12, len(raw) - 1):
        *good, last = records(tmp_path, "a.jsonl.gz", raw + b"\0" * 600 + raw[:cut])
        assert {record.text for record in good} == {LINE.encode()}
        assert (last.line, last.flaw.skippable) == (len(good) + 1, False)


def frame(window: int, content: bytes) -> bytes:
    """Return a zstd frame of one uncompressed block that requires a window of 2**window bytes."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return bytes([0x28, 0xB5, 0x2F, 0xFD, 0, (window - 10) << 3]) + block


def test_zstd_window_that_is_too_large_is_reported_with_a_remedy(tmp_path):
    assert outcomes(tmp_path, "a.jsonl.zst", frame(27, LINE.encode())) == [(1, LINE)]
    reason = (
        "the zstd stream has a window of more than 128 MiB; compress it again without --long, or with "
        f"--long=27 at most; {MORE}"
    )
    assert outcomes(tmp_path, "a.jsonl.zst", frame(31, LINE.encode())) == [(1, reason)]


def write_table(path: Path, rows: list[dict], schema: pa.Schema | None = None, size: int = 1000) -> Path:
    table = pa.Table.from_pylist(rows, schema=schema)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=size)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=size)
    return path


def read(path: Path, rows_before: int = 0) -> list[Record]:
    return [record for batch in read_batches(source(path, rows_before)) for record in batch.records]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_table_rows_become_json_without_nulls_and_unknown_columns(tmp_path, name):
    call = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    rows = [
        {"id": 1, "messages": [{"role": "user", "content": "é"}, {"role": "assistant", "tool_calls": call}]},
        {"id": 2, "messages": [{"role": "assistant", "content": "a", "name": "n"}], "tools": "[]"},
        {"id": 3},
    ]
    schema = pa.Table.from_pylist(rows[:1]).schema.append(pa.field("tools", pa.string()))
    path = write_table(tmp_path / name, rows, schema)
    del rows[1]["messages"][0]["name"]  # no column of the schema
    expected = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    all_records = read(path, rows_before=10)
    assert all_records == [
        Record(11 + index, json.dumps(row, ensure_ascii=False).encode()) for index, row in enumerate(expected)
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_tables_are_read_in_batches(tmp_path, name):
    rows = [{"prompt": f"q{row}", "completion": "a"} for row in range(1000)]
    path = write_table(tmp_path / name, rows, size=300)
    all_batches = list(read_batches(source(path)))
    assert [len(batch.records) for batch in all_batches] == [256, 256, 256, 232]
    assert sum(batch.consumed for batch in all_batches) == path.stat().st_size
    texts = [json.loads(record.text) for batch in all_batches for record in batch.records]
    assert texts == rows
    assert [record.line for batch in all_batches for record in batch.records] == list(range(1, 1001))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_table_without_conversation_columns_is_a_flaw(tmp_path, name):
    path = write_table(tmp_path / name, [{"body": "a", "prompt": "b"}])
    reason = f"no conversation; the columns are body, prompt, expected {FORMS}"
    assert read(path) == [Record(1, b"", Flaw(reason, "no conversation in the columns", skippable=False))]
    empty = write_table(tmp_path / name, [], pa.schema({"messages": pa.string()}))
    assert read(empty) == [Record(1, b"", Flaw(NOTHING, NOTHING))]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_without_a_json_type_are_text_or_a_flaw_of_their_row(tmp_path, name):
    when = datetime(2024, 5, 6)
    good = {"content": b"a", "at": when, "map": [("k", 1)]}
    rows = [{"messages": [good]}, {"messages": [{"content": b"\xff"}]}]
    turn = pa.struct(
        {"content": pa.binary(), "at": pa.timestamp("us"), "map": pa.map_(pa.string(), pa.int64())}
    )
    schema = pa.schema({"messages": pa.list_(turn)})
    assert read(write_table(tmp_path / name, rows, schema)) == [
        Record(1, b'{"messages": [{"content": "a", "at": "2024-05-06 00:00:00", "map": {"k": 1}}]}'),
        Record(2, b"", NOT_UTF8),
    ]


def test_text_that_is_not_utf8_is_a_flaw_of_its_row(tmp_path):
    binary = pa.array([b"a", b"\xff", b"c"])
    texts = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    table = pa.table({"prompt": texts, "completion": texts})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert read(tmp_path / "a.arrow") == [
        Record(1, b'{"prompt": "a", "completion": "a"}'),
        Record(2, b"", NOT_UTF8),
        Record(3, b'{"prompt": "c", "completion": "c"}'),
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables_are_flaws(tmp_path, name):
    path = write_table(
        tmp_path / name, [{"prompt": text, "completion": "a"} for text in noise(2000)], size=500
    )
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    *good, last = read(path)
    kind = path.suffix[1:]
    assert last.flaw.reason.startswith(f"the {kind} file is damaged (")
    assert last.flaw.reason.endswith(f"); {MORE}")
    assert last.line == len(good) + 1 == (1 if kind == "parquet" else 501)
    path.write_bytes(b"text")
    (only,) = read(path)
    assert (only.line, only.flaw.reason.split(" (")[0]) == (1, f"the {kind} file is damaged")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_large_table_rows_are_converted_a_few_at_a_time(tmp_path, name):
    path = write_table(tmp_path / name, [{"prompt": f"{row}" * MiB, "completion": "a"} for row in range(99)])
    lengths: list[int] = []
    peak = peak_of(
        lambda: lengths.extend(
            len(record.text) for batch in read_batches(source(path)) for record in batch.records
        )
    )
    assert len(lengths) == 99 and sum(lengths) > 99 * MiB
    assert peak < 40 * MiB


def test_twenty_faults_are_listed_and_all_are_counted_by_kind():
    faults = Faults()
    faults.raise_if_any()
    empty = "messages[1]: empty user turn"
    faults.add(Fault(f"a:{line}", "empty turn", empty) for line in range(1, 19))
    faults.add(Fault(f"b:{line}", "broken JSON", "broken JSON: x") for line in range(1, 6))
    with pytest.raises(UserError) as caught:
        faults.raise_if_any()
    lines = str(caught.value).splitlines()
    assert lines[0] == "23 conversations cannot be used:"
    assert lines[1] == "  a:1: messages[1]: empty user turn"
    assert lines[20] == "  b:2: broken JSON: x"
    assert lines[21:] == ["  ... and 3 more. All of them:", "  18 x empty turn", "  5 x broken JSON"]


def test_few_faults_are_listed_without_counts():
    faults = Faults()
    faults.add([Fault("a:7", "empty turn", "messages[0]: empty user turn")])
    with pytest.raises(UserError) as caught:
        faults.raise_if_any()
    assert str(caught.value) == "1 conversation cannot be used:\n  a:7: messages[0]: empty user turn"
