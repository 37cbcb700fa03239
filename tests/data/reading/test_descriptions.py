"""Folders written by save_to_disk, Arrow files, and entries of dataset_info.json."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import RowRules
from dft.data.reading.reader import read_batches
from dft.data.reading.sources import resolve_sources
from dft.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def rows(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"query": f"q{number}", "response": "a", "id": number} for number in range(start, start + count)]


def read(*values: object) -> list[tuple[str, int, str]]:
    """Return the file, the line and the query of every row."""
    return [
        (source.name, record.line, json.loads(record.text)["query"])
        for source in resolve_sources([str(value) for value in values], "--data_files")
        for batch in read_batches(source)
        for record in batch.records
    ]


def error_of(value: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve_sources([str(value)], "--data_files")
    return str(caught.value).removeprefix(f"--data_files {value}: ")


def test_saved_dataset_is_read_in_order_across_its_shards(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows(5)).save_to_disk(folder, num_shards=2)
    expected = [(str(folder), number + 1, f"q{number}") for number in range(5)]
    assert read(folder) == expected
    assert [line for _, line, _ in read(f"{folder}/*")] == [1, 2, 3, 1, 2]  # the files, not the dataset
    assert read(f"{folder}/") == [(f"{folder}/".rstrip("/"), line, query) for _, line, query in expected]
    (tmp_path / "other.jsonl").write_text(json.dumps({"query": "x", "response": "a"}))
    assert read(tmp_path) == [(str(tmp_path / "other.jsonl"), 1, "x"), *expected]


def test_saved_dataset_with_several_splits_is_an_error_that_names_them(tmp_path):
    folder = tmp_path / "saved"
    train, test = (datasets.Dataset.from_list(rows(1, start)) for start in (0, 7))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder)
    assert error_of(folder) == (
        f"holds the splits train, test; pass the one to use: {folder}/train or {folder}/test"
    )
    assert read(folder / "test") == [(str(folder / "test"), 1, "q7")]
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "single")
    assert read(tmp_path / "single") == [(str(tmp_path / "single" / "train"), 1, "q0")]


def test_damaged_saved_datasets_are_errors(tmp_path):
    datasets.Dataset.from_list(rows(1)).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(b"x")
    assert error_of(tmp_path / "saved").startswith(f"{file.name} in it cannot be read (")
    file.unlink()
    assert error_of(tmp_path / "saved").startswith(f"{file.name} in it cannot be read (")
    datasets.Dataset.from_dict({"query": [], "response": []}).save_to_disk(tmp_path / "none")
    assert error_of(tmp_path / "none") == "the dataset has no rows"


def test_arrow_files_may_have_the_file_or_the_stream_format(tmp_path):
    table = pa.Table.from_pylist(rows(3))
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        path = tmp_path / name
        assert read(path) == [(str(path), number + 1, f"q{number}") for number in range(3)]
        (source,) = resolve_sources([str(path)], "--data_files")
        assert sum(batch.consumed for batch in read_batches(source)) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_are_not_read_are_counted(tmp_path, name):
    table = pa.Table.from_pylist([
        {"query": "q", "response": "a", "id": 1, "tags": ["x"], "note": None, "images": [{"bytes": b"x"}]},
        {"query": "q", "response": "a", "id": 2, "tags": ["x", "y"], "note": "n", "images": []},
    ])  # fmt: skip
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (batch,) = read_batches(*resolve_sources([str(path)], "--data_files"))
    assert batch.unread == {"id": 2, "tags": 2, "note": 1}
    first, second = (json.loads(record.text) for record in batch.records)
    assert (first["images"], second["images"]) == (1, 0)


def described(tmp_path: Path, entry: dict[str, object], row: dict[str, object]) -> Conversation:
    """Return the conversation of a row in a file that an entry of dataset_info.json describes."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "rows.jsonl", **entry}}))
    (source,) = resolve_sources([f"{tmp_path}/dataset_info.json:x"], "--data_files")
    assert source.name == str(tmp_path / "rows.jsonl")
    (batch,) = read_batches(source)
    return parse_conversation(batch.records[0].text, source.rules)


@pytest.mark.parametrize(
    ("entry", "row", "messages"),
    [
        ({}, {"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
        (
            {"formatting": "alpaca"},
            {"instruction": "q", "output": "a", "system": "s"},
            [SYSTEM, USER, ANSWER],
        ),
        (
            {"columns": {"prompt": "question", "response": "answer", "system": "persona"}},
            {"question": "q", "answer": "a", "persona": "s", "input": "not read"},
            [SYSTEM, USER, ANSWER],
        ),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [USER, ANSWER],
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "system": "persona"},
                "tags": {
                    "role_tag": "who", "content_tag": "said",
                    "user_tag": "patient", "assistant_tag": "doctor",
                },
            },
            {"talk": [{"who": "patient", "said": "q"}, {"who": "doctor", "said": "a"}], "persona": "s"},
            [SYSTEM, USER, ANSWER],
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {
                    "role_tag": "role", "content_tag": "content", "user_tag": "user",
                    "assistant_tag": "assistant", "system_tag": "system",
                },
            },
            {"messages": [SYSTEM, USER, ANSWER]},
            [SYSTEM, USER, ANSWER],
        ),
        (
            {"formatting": "openai", "columns": {"messages": "messages"}},
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]},
                          {"role": "tool", "content": "1"}, ANSWER]},
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {}}}
                ]},
                {"role": "tool", "content": "1"},
                ANSWER,
            ],
        ),
        ({"formatting": "openai"}, {"messages": [USER, ANSWER]}, [USER, ANSWER]),
    ],
)  # fmt: skip
def test_rows_are_read_as_their_description_says(tmp_path, entry, row, messages):
    assert described(tmp_path, entry, row).messages == messages


def test_columns_that_a_description_leaves_out_are_not_read(tmp_path):
    entry = {"columns": {"prompt": "question", "response": "answer"}}
    row = {"question": "q", "answer": "a", "input": "x", "system": "s", "id": 1}
    assert described(tmp_path, entry, row).unread == ("input", "system", "id")


def test_judged_answers_pairs_and_images_are_errors_in_described_files_too(tmp_path):
    kto = {"columns": {"prompt": "question", "response": "answer", "kto_tag": "good"}}
    row = {"question": "q", "answer": "a", "good": False}
    with pytest.raises(BadLine, match="^'good' is false: .* --keep_rows good=true trains on"):
        described(tmp_path, kto, row)
    pairs = {"ranking": True, "columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}}
    with pytest.raises(BadLine, match="^'better' makes this a preference pair; --use_chosen True trains on"):
        described(tmp_path, pairs, {"question": "q", "better": "a", "worse": "b"})
    with pytest.raises(BadLine, match="^'images' holds an image"):
        described(tmp_path, {}, {"instruction": "q", "output": "a", "images": ["1.jpg"]})


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (3, "the entry must be an object, got a number"),
        (
            {"num_samples": 3},
            "'num_samples' of this entry is not supported; pass the file itself, with --columns",
        ),
        ({"formatting": "x"}, "formatting 'x' must be alpaca, sharegpt or openai"),
        (
            {"columns": {"prompt": "text"}},
            "describes text for pretraining (no response column), but this trainer fine-tunes on "
            "conversations",
        ),
        (
            {"columns": {"messages": "x"}},
            "'columns' has 'messages'; for alpaca data it may have system, tools,",
        ),
        ({"tags": ["x"]}, "'tags' must be an object of strings"),
        ({"file_name": "none.json"}, "its file "),
        (
            {"file_name": None, "ms_hub_url": "x"},
            "the entry names neither a file (file_name) nor a dataset of",
        ),
    ],
)
def test_unusable_entries_are_errors(tmp_path, entry, reason):
    if isinstance(entry, dict):
        entry = {key: value for key, value in {"file_name": "a", **entry}.items() if value is not None}
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"x": entry, "y": {}}))
    assert error_of(f"{path}:x").startswith(reason)
    assert error_of(f"{path}:z") == "there is no 'z' in it; its entries are x, y"


def test_described_dataset_of_the_hub_is_loaded_with_its_subset_and_split(tmp_path, monkeypatch):
    built = datasets.Dataset.from_list(rows(2))
    built.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: calls.append((args, keys)) or loaded)
    path = tmp_path / "dataset_info.json"
    entry = {"hf_hub_url": "owner/name", "ms_hub_url": "x", "subset": "en", "split": "full"}
    path.write_text(json.dumps({"x": entry}))
    assert read(f"{path}:x") == [("owner/name/en:full", 1, "q0"), ("owner/name/en:full", 2, "q1")]
    assert calls == [(("owner/name", "en"), {"split": "full"})]


def test_description_is_not_a_data_file(tmp_path):
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"x": {}, "y": {}}))
    assert error_of(path) == f"describes datasets; name one of its entries, like {path}:x"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "q", "response": "a"}))
    assert read(tmp_path) == [(str(tmp_path / "rows.jsonl"), 1, "q")]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"file_name": 5}, "'file_name' must be a string, got a number"),
        ({"hf_hub_url": 5}, "'hf_hub_url' must be a string, got a number"),
        ({"hf_hub_url": "a/b", "subset": 3}, "'subset' must be a string, got a number"),
        (
            {"tags": {"role_tag": "role"}},
            "'tags' are for turns, which alpaca data does not have; check 'formatting'",
        ),
        (
            {"ranking": True, "columns": {"prompt": "q", "response": "a"}},
            "'ranking' says that the rows are preference pairs, but 'columns' names no 'chosen'",
        ),
    ],
)
def test_keys_of_an_entry_that_would_have_no_effect_are_errors(tmp_path, entry, reason):
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"x": {"file_name": "a", **entry}}))
    assert error_of(f"{path}:x") == reason


def test_null_keys_of_an_entry_are_absent(tmp_path):
    entry = {"subset": None, "split": None, "columns": None}
    row = {"instruction": "q", "output": "a"}
    assert described(tmp_path, entry, row).messages == [USER, ANSWER]


def test_the_digest_of_a_described_file_is_checked(tmp_path):
    row = {"instruction": "q", "output": "a"}
    digest = hashlib.sha1(json.dumps(row).encode()).hexdigest()
    assert described(tmp_path, {"file_sha1": digest.upper()}, row).messages == [USER, ANSWER]
    with pytest.raises(UserError) as caught:
        described(tmp_path, {"file_sha1": digest}, {**row, "output": "b"})
    assert f"but its entry says {digest}; the file was changed or is incomplete." in str(caught.value)


def test_images_of_tables_are_counted_under_any_name_and_type(tmp_path):
    path = tmp_path / "a.parquet"
    values = {
        "response": ["a", "b"],
        "pic": [b"\xff", None],
        "image": pa.array(["", "x"], pa.large_string()),
    }
    pq.write_table(pa.table(values), path)
    rules = RowRules(columns=(("images", "pic"),))
    (source,) = resolve_sources([str(path)], "--data_files")
    (batch,) = read_batches(replace(source, rules=rules))
    first, second = (json.loads(record.text) for record in batch.records)
    assert first == {"response": "a", "pic": 1, "image": ""}
    assert second == {"response": "b", "image": "x"}
