"""--columns, --ignore_columns, --keep_rows and --use_chosen, from the flags to the prepared data."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.arguments.data import DataArguments, check_data_arguments
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.errors import UserError
from dft.report.terminal.data import data_summary
from tests.data.rows import column, conversation, numbered, write

RENAMED = ["instruction=question", "output=answer", "system=persona"]


@pytest.fixture
def run(encoder, tmp_path):
    """Function that prepares files."""

    def prepare_files(*files: str, eval_files: tuple[str, ...] = (), **options: object) -> PreparedData:
        settings = PrepareOptions(**{"max_length": 64, **options})
        return prepare([*files], [*eval_files], encoder, settings, cache_dir=tmp_path / "cache", workers=0)

    return prepare_files


def save(path: Path, *rows: dict[str, object]) -> str:
    return write(path, list(rows))


def error_of(run, *files: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        run(*files, **options)
    return str(caught.value)


def test_renamed_columns_give_the_same_tokens_as_messages(run, tmp_path):
    row = {"question": "q", "answer": "a", "persona": "s", "id": 1}
    messages = [{"role": "system", "content": "s"}, *conversation("q")["messages"]]
    plain = run(save(tmp_path / "plain.jsonl", {"messages": messages})).datasets["train"]
    renamed = run(save(tmp_path / "a.jsonl", row), columns=RENAMED)
    for name in ("input_ids", "labels"):
        assert column(renamed.datasets["train"], name) == column(plain, name)
    assert renamed.report["unread_columns"] == {"id": 1}
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), table)
    (tmp_path / "a.csv").write_text("id,question,answer,persona\n1,q,a,s\n")
    for file in (table, tmp_path / "a.csv"):
        prepared = run(str(file), columns=RENAMED)
        assert column(prepared.datasets["train"], "labels") == column(plain, "labels")
        assert prepared.report["unread_columns"] == {"id": 1}


def test_a_flag_may_be_for_one_file(run, tmp_path):
    first = save(tmp_path / "a.jsonl", {"question": "q1", "output": "a", "label": True})
    second = save(tmp_path / "b.jsonl", {"instruction": "q2", "question": "x", "output": "a"})
    options = {
        "columns": ["a.jsonl:instruction=question"],
        "keep_rows": [f"{first}:label=true"],
        "ignore_columns": ["b.jsonl:question"],
    }
    report = run(first, second, **options).report
    assert report["train"]["conversations"] == 2
    assert report["unread_columns"] == {"label": 1, "question": 1}
    assert error_of(run, first, columns=["c.jsonl:instruction=question"]) == (
        "--columns c.jsonl:instruction=question: there is no file 'c.jsonl' among the data files"
    )


def test_a_column_that_no_row_has_is_an_error(run, tmp_path):
    file = save(tmp_path / "a.jsonl", conversation("q", id=1))
    for flag, value, name in (
        ("columns", "system=persone", "persone"),
        ("ignore_columns", "images", "images"),
        ("ignore_columns", "a.jsonl:label", "label"),
    ):
        message = f"--{flag} {value}: no row that is used has a column '{name}'"
        assert error_of(run, file, **{flag: [value]}) == message
    assert run(file, ignore_columns=["id"]).report["unread_columns"] == {"id": 1}
    empty = save(tmp_path / "null.jsonl", conversation("q", images=None))
    assert run(empty, ignore_columns=["images"]).report["unread_columns"] == {}
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([conversation("q", id=1)]), table)
    assert run(str(table), ignore_columns=["id"]).report["unread_columns"] == {"id": 1}
    schema = pa.schema([*pa.Table.from_pylist([conversation("q")]).schema, ("images", pa.string())])
    pq.write_table(pa.Table.from_pylist([conversation("q")], schema=schema), table)
    assert run(str(table), ignore_columns=["images"]).report["unread_columns"] == {}


def test_kept_rows_are_those_that_fulfil_the_condition(run, tmp_path):
    rows = [conversation(f"q{number}", label=number % 3 == 0) for number in range(6)]
    report = run(save(tmp_path / "a.jsonl", *rows), keep_rows=["label=true"]).report
    assert report["conversations_read"] == 6
    assert report["train"]["conversations"] == 2
    assert report["rows_left_out"] == {"--keep_rows label=true": 4}
    lines = data_summary(report)
    assert "left out    4 rows by --keep_rows label=true" in lines
    assert "not read    1 column: label (2)" in lines
    rows = [conversation("q", label=False)]
    message = (
        "--data_files: no conversation is left of 1: left out 1 by --keep_rows label=true; check the value "
        "and its column"
    )
    assert error_of(run, save(tmp_path / "b.jsonl", *rows), keep_rows=["label=true"]) == message


def test_a_column_with_a_meaning_is_an_error_with_file_and_line(run, tmp_path):
    file = save(tmp_path / "a.jsonl", conversation("q"), conversation("q2", images=["1.jpg"]))
    assert error_of(run, file).splitlines()[1].startswith(f"  {file}:2: 'images' holds an image, and this")
    assert run(file, ignore_columns=["images"]).report["train"]["conversations"] == 2
    report = run(file, on_bad_data="skip").report
    assert report["rejected_by_reason"] == {"images, videos or audio": 1}


def test_files_for_evaluation_may_hold_another_split(run, tmp_path):
    train = save(tmp_path / "train.jsonl", conversation("q", split="train"))
    test = save(tmp_path / "test.jsonl", conversation("q2", split="test"))
    assert set(run(train, eval_files=(test,)).datasets) == {"train", "eval"}
    assert f"{test}:1: 'split' is 'test'" in error_of(run, test, eval_files=(train,))


def test_only_the_chosen_answer_of_a_pair_is_supervised(run, tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    file = save(tmp_path / "a.jsonl", row)
    assert f"{file}:1: 'chosen' makes this a preference pair; --use_chosen True" in error_of(run, file)
    plain = run(save(tmp_path / "plain.jsonl", conversation("q"))).datasets["train"]
    assert column(run(file, use_chosen=True).datasets["train"], "labels") == column(plain, "labels")


def test_unread_columns_are_one_line_of_at_most_eight_names(run, tmp_path):
    row = conversation("q", **{f"c{number}": 1 for number in range(10)})
    report = run(save(tmp_path / "a.jsonl", row, row)).report
    names = ", ".join(f"c{number} (2)" for number in range(8))
    (line,) = (line for line in data_summary(report) if line.startswith("not read"))
    assert line == f"not read    10 columns: {names} and 2 more, see data_report.json"
    assert report["unread_columns"] == {f"c{number}": 2 for number in range(10)}


def test_rules_are_part_of_the_cache_key(run, tmp_path):
    row = {"instruction": "q", "question": "q2", "output": "a"}
    file = save(tmp_path / "a.jsonl", row)
    first = run(file, ignore_columns=["question"]).path
    second = run(file, ignore_columns=["instruction"], columns=["instruction=question"]).path
    assert first != second
    assert run(file, ignore_columns=["question"]).path == first


def test_entry_of_a_description_is_prepared(run, tmp_path):
    save(tmp_path / "rows.jsonl", {"question": "q", "answer": "a", "system": "not read"})
    description = tmp_path / "dataset_info.json"
    entry = {"file_name": "rows.jsonl", "columns": {"prompt": "question", "response": "answer"}}
    description.write_text(json.dumps({"x": entry}))
    plain = run(save(tmp_path / "plain.jsonl", conversation("q"))).datasets["train"]
    prepared = run(f"{description}:x")
    assert column(prepared.datasets["train"], "labels") == column(plain, "labels")
    assert prepared.report["unread_columns"] == {"system": 1}
    with_system = run(f"{description}:x", columns=[f"{description}:x:system=system"])
    assert with_system.report["unread_columns"] == {}


@pytest.mark.parametrize(
    ("flag", "values", "reason"),
    [
        ("columns", ["instruction"], "--columns instruction: expected NAME=COLUMN or FILE:NAME=COLUMN"),
        ("columns", ["=x"], "--columns =x: expected NAME=COLUMN or FILE:NAME=COLUMN"),
        ("columns", ["x="], "--columns x=: expected NAME=COLUMN or FILE:NAME=COLUMN"),
        ("columns", ["a=x", "a=y"], "--columns a=x a=y: 'a' appears twice"),
        ("columns", ["a=x", "b=x"], "--columns a=x b=x: 'x' appears twice"),
        ("keep_rows", ["label"], "--keep_rows label: expected COLUMN=VALUE or FILE:COLUMN=VALUE"),
        ("ignore_columns", ["a.jsonl:"], "--ignore_columns a.jsonl:: expected COLUMN or FILE:COLUMN"),
    ],
)
def test_malformed_flags_are_errors_before_anything_is_read(flag, values, reason):
    with pytest.raises(UserError) as caught:
        check_data_arguments(DataArguments(data_files=["none.jsonl"], **{flag: values}))
    assert str(caught.value) == reason


def test_rows_of_one_form_are_counted_alike_by_one_and_by_several_processes(
    run, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr("dft.data.preparing.encode.SMALL", 0)
    file = write(tmp_path / "a.jsonl", [{**row, "id": 1, "label": True} for row in numbered(600)])
    options = PrepareOptions(max_length=64, keep_rows=["label=true"])
    reports = [
        prepare([file], [], encoder, options, cache_dir=tmp_path / f"cache{workers}", workers=workers).report
        for workers in (0, 2)
    ]
    assert reports[0]["unread_columns"] == reports[1]["unread_columns"] == {"id": 600, "label": 600}


def test_a_name_that_no_row_form_reads_is_an_error(run, tmp_path):
    file = save(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    assert error_of(run, file, columns=["question=instruction"]).startswith(
        "--columns question=instruction: no row form reads 'question'; the names are messages, "
    )
    judged = save(tmp_path / "b.jsonl", conversation("q", good=False))
    assert "'good' is false" in error_of(run, judged, columns=["label=good"])


def test_a_flag_replaces_the_column_of_a_description(run, tmp_path):
    save(tmp_path / "a.jsonl", {"question": "x", "better": "q", "answer": "a"})
    entry = {"file_name": "a.jsonl", "columns": {"prompt": "question", "response": "answer"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    prepared = run(f"{tmp_path}/dataset_info.json:a", columns=["instruction=better"])
    plain = run(save(tmp_path / "plain.jsonl", conversation("q")))
    assert column(prepared.datasets["train"], "input_ids") == column(plain.datasets["train"], "input_ids")
    assert prepared.report["unread_columns"] == {"question": 1}
