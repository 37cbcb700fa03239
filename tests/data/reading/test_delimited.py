"""Rows of .csv and .tsv files, and files in zip archives."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.row_rules import RowRules
from dft.data.reading.data_file import DataFile, split_suffix
from dft.data.reading.reader import read_batches
from dft.data.reading.records import Flaw, Record
from dft.data.reading.sources import resolve_sources
from dft.errors import UserError

HEAD = "instruction,input,output\n"
LINE = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def read(path: Path, rules: RowRules | None = None) -> list[Record]:
    kind, compression = split_suffix(str(path))
    source = DataFile(str(path), path, kind, compression, 0, rules=rules or RowRules())
    return [record for batch in read_batches(source) for record in batch.records]


def rows_of(path: Path, text: str | bytes) -> list[tuple[int, dict[str, str]]]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    records = read(path)
    assert all(record.flaw is None for record in records)
    return [(record.line, json.loads(record.text)) for record in records]


def flaws_of(path: Path, text: str | bytes) -> list[tuple[int, str, bool]]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    flaws = [(record.line, record.flaw) for record in read(path) if record.flaw is not None]
    return [(line, flaw.reason, flaw.skippable) for line, flaw in flaws]


def test_rows_have_the_line_they_begin_on_and_no_empty_cells(tmp_path):
    text = "\ufeff" + HEAD + '1,2,3\r\n\r\nq,,"a, ""b""\nc"\n,,\nlast,"",é'
    assert rows_of(tmp_path / "a.csv", text) == [
        (2, {"instruction": "1", "input": "2", "output": "3"}),
        (4, {"instruction": "q", "output": 'a, "b"\nc'}),
        (7, {"instruction": "last", "output": "é"}),
    ]
    rows = rows_of(tmp_path / "a.tsv", "query\tresponse\nq, r\ta\n")
    assert rows == [(2, {"query": "q, r", "response": "a"})]


def test_long_files_are_read_in_pieces(tmp_path):
    cells = [f"é{number}" * 20 for number in range(5_000)]
    text = "query,response\n" + "".join(f"{cell},{cell}\n" for cell in cells)
    assert rows_of(tmp_path / "a.csv", text) == [
        (number, {"query": cell, "response": cell}) for number, cell in enumerate(cells, 2)
    ]
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(text.encode())
    assert len(read(tmp_path / "a.csv.gz")) == 5_000


@pytest.mark.parametrize(
    ("text", "flaws"),
    [
        ("", [(1, "there is no conversation in this file", True)]),
        (HEAD, [(1, "there is no conversation in this file", True)]),
        (HEAD + "1,2\n1,2,3,4\n", [
            (2, "2 cells, but the first row names 3", True), (3, "4 cells, but the first row names 3", True),
        ]),
        (HEAD.encode() + b"1,\xff,3\n4,5,6\n", [(2, "not valid UTF-8", True)]),
        (HEAD + '1,"2,3\n', [
            (2, "broken csv: unexpected end of data; the rest of the file cannot be read", False)
        ]),
        (HEAD + '1,"2"x,3\n', [
            (2, "broken csv: ',' expected after '\"'; the rest of the file cannot be read", False)
        ]),
        ("output,output\n1,2\n", [(1, "the column 'output' appears twice in the first row", False)]),
        ("a,b\n1,2\n", [
            (1, "no conversation; the columns are a, b, expected 'messages', 'conversations', "
             "'conversation', 'instruction' with 'output', 'response' or 'prompt' with 'completion'; "
             "--columns NAME=COLUMN reads a column under another name", False)
        ]),
        ("a;b\n1;2\n", [
            (1, "no conversation; the columns are a;b, expected 'messages', 'conversations', "
             "'conversation', 'instruction' with 'output', 'response' or 'prompt' with 'completion'; "
             "--columns NAME=COLUMN reads a column under another name; its cells are separated by ';', not "
             "by ','", False)
        ]),
        ("query,response\nq,a\n".encode("utf-16"), [
            (1, "the first row is not valid UTF-8; it looks like UTF-16, which iconv -f UTF-16 -t UTF-8 "
             "converts", False)
        ]),
    ],
)  # fmt: skip
def test_unusable_rows_are_flaws(tmp_path, text, flaws):
    assert flaws_of(tmp_path / "a.csv", text) == flaws


def test_truncated_gzip_file_is_a_flaw_of_the_line_after_the_last(tmp_path):
    path = tmp_path / "a.csv.gz"
    packed = gzip.compress((HEAD + "1,2,3\n").encode())
    path.write_bytes(packed[:-4])
    *_, last = read(path)
    kind = "the gzip stream is damaged or truncated"
    reason = f"{kind} (its end marker is missing); the rest of the file cannot be read"
    assert last == Record(3, b"", Flaw(reason, kind, skippable=False))


def test_columns_are_renamed_before_the_header_is_judged(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nq,a\n")
    rules = RowRules(columns=(("query", "question"), ("response", "answer")))
    (record,) = read(path, rules)
    assert parse_conversation(record.text, rules).messages == [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip


def test_lists_in_cells_are_json(tmp_path):
    turns = json.dumps(json.loads(LINE)["messages"]).replace('"', '""')
    ((_, row),) = rows_of(tmp_path / "a.csv", f'id,messages\n1,"{turns}"\n')
    assert parse_conversation(json.dumps(row).encode()).messages == json.loads(LINE)["messages"]


def make_zip(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def test_zip_archive_means_the_data_files_in_it(tmp_path):
    path = make_zip(tmp_path / "a.zip", {
        "b.jsonl": LINE.encode() * 3, "x/c.json.gz": gzip.compress(f"[{LINE}]".encode()),
        "d.csv": (HEAD + "1,2,3\n").encode(), "README.md": b"x", "__MACOSX/b.jsonl": b"x", ".e.jsonl": b"x",
    })  # fmt: skip
    sources = resolve_sources([path, str(tmp_path)], "--data_files")
    assert [(source.name, source.entry) for source in sources] == [
        (f"{path}/{name}", entry) for entry in (0, 1) for name in ("b.jsonl", "d.csv", "x/c.json.gz")
    ]
    batches = [list(read_batches(source)) for source in sources[:3]]
    assert [[record.line for batch in part for record in batch.records] for part in batches] == [
        [1, 2, 3],
        [2],
        [1],
    ]
    with zipfile.ZipFile(path) as archive:
        sizes = [archive.getinfo(name).compress_size for name in ("b.jsonl", "d.csv", "x/c.json.gz")]
    assert [source.size for source in sources[:3]] == sizes
    for part, size in zip(batches, sizes, strict=True):
        assert abs(sum(batch.consumed for batch in part) - size) <= 1


def test_unusable_archives_are_errors(tmp_path):
    def error_of(path: str) -> str:
        with pytest.raises(UserError) as caught:
            resolve_sources([path], "--data_files")
        return str(caught.value).removeprefix(f"--data_files {path}: ")

    (tmp_path / "no.zip").write_bytes(b"x")
    assert error_of(str(tmp_path / "no.zip")) == (
        "is not a zip archive, or a damaged one (File is not a zip file)"
    )
    assert error_of(make_zip(tmp_path / "empty.zip", {"a.txt": b"x"})).startswith(
        "is an archive that holds no file ending in .jsonl,"
    )
    assert error_of(make_zip(tmp_path / "table.zip", {"a.parquet": b"x"})) == (
        "holds a.parquet, which can only be read outside of an archive; extract it"
    )
    damaged = Path(make_zip(tmp_path / "damaged.zip", {"a.jsonl": LINE.encode() * 100}))
    content = bytearray(damaged.read_bytes())
    content[60] ^= 255
    damaged.write_bytes(content)
    (source,) = resolve_sources([str(damaged)], "--data_files")
    *_, last = (record for batch in read_batches(source) for record in batch.records)
    assert last.flaw is not None
    assert not last.flaw.skippable


def test_columns_without_a_name_get_one(tmp_path):
    text = ",query,response,\n0,q,a,\n1,r,b,x\n"
    assert rows_of(tmp_path / "a.csv", text) == [
        (2, {"unnamed_0": "0", "query": "q", "response": "a"}),
        (3, {"unnamed_0": "1", "query": "r", "response": "b", "unnamed_3": "x"}),
    ]


def test_utf16_is_named(tmp_path):
    text = "query,response\nq,a\n"
    hint = "; it looks like UTF-16, which iconv -f UTF-16 -t UTF-8 converts"
    for encoding in ("utf-16", "utf-16-le"):
        ((line, reason, _),) = flaws_of(tmp_path / "a.csv", text.encode(encoding))
        assert line == 1 and reason.endswith(hint)


def test_archives_in_archives_are_refused_and_descriptions_are_skipped(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/a.jsonl", LINE)
        archive.writestr("data/dataset_info.json", "{}")
    assert [source.member for source in resolve_sources([str(path)], "--data_files")] == ["data/a.jsonl"]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data/more.ZIP", "x")
    with pytest.raises(UserError, match=r"holds data/more.ZIP, which can only be read outside of an archive"):
        resolve_sources([str(path)], "--data_files")
