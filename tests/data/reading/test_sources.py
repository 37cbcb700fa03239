"""Values of --data_files: files, folders, patterns and hub datasets."""

import json
import os
from pathlib import Path

import datasets
import httpx
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from dft.data.reading.data_file import DataFile
from dft.data.reading.reader import read_batches
from dft.data.reading.sources import resolve_sources
from dft.errors import UserError

LINE = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
ENDINGS = ".jsonl, .ndjson, .json, .csv or .tsv (each also with .gz or .zst), .parquet, .arrow or .zip"


def touch(folder: Path, *names: str) -> list[str]:
    """Write files that are not empty, and return their paths."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE)
    return [str(folder / name) for name in names]


def error_of(value: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_sources([value], "--data_files")
    prefix = f"--data_files {value}: "
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


def names(*values: str) -> list[str]:
    return [source.name for source in resolve_sources(list(values), "--data_files")]


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.jsonl", "jsonl", None),
        ("a.json", "json", None),
        ("a.jsonl.gz", "jsonl", "gzip"),
        ("a.json.gz", "json", "gzip"),
        ("a.jsonl.zst", "jsonl", "zstd"),
        ("a.json.zst", "json", "zstd"),
        ("a.ndjson", "jsonl", None),
        ("a.csv", "csv", None),
        ("a.tsv.gz", "tsv", "gzip"),
        ("a.parquet", "parquet", None),
        ("a.arrow", "arrow", None),
        ("A.JSONL.GZ", "jsonl", "gzip"),
    ],
)
def test_suffix_determines_kind_and_compression(tmp_path, name, kind, compression):
    (file,) = touch(tmp_path, name)
    assert resolve_sources([file], "--data_files") == [DataFile(file, Path(file), kind, compression, 0)]


def test_files_keep_their_order_and_may_be_repeated(tmp_path, monkeypatch):
    touch(tmp_path, "b.jsonl", "a.jsonl")
    monkeypatch.chdir(tmp_path)
    sources = resolve_sources(["b.jsonl", "a.jsonl", "./b.jsonl", "b.jsonl"], "--data_files")
    assert [(source.name, source.entry) for source in sources] == [
        ("b.jsonl", 0), ("a.jsonl", 1), ("./b.jsonl", 2), ("b.jsonl", 3),
    ]  # fmt: skip
    assert resolve_sources([], "--data_files") == []


def test_folder_means_all_data_files_below_it_except_hidden_ones(tmp_path):
    files = touch(tmp_path, "b.jsonl", "a/x.parquet", "a/b/y.json.gz")
    touch(
        tmp_path, "README.md", ".hidden.jsonl", ".cache/z.jsonl", "a/.ipynb_checkpoints/x.jsonl", "c.txt.gz"
    )
    assert names(str(tmp_path)) == sorted(files)
    assert [source.entry for source in resolve_sources([files[0], str(tmp_path)], "--x")] == [0, 1, 1, 1]


def test_links_to_folders_are_followed_once(tmp_path):
    (file,) = touch(tmp_path / "elsewhere", "a.jsonl")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    assert names(str(tmp_path / "data")) == [str(tmp_path / "data" / "link" / "a.jsonl")]


def test_folders_without_data_files_are_errors(tmp_path):
    assert error_of(str(tmp_path)) == f"is a folder that holds no file ending in {ENDINGS}"
    touch(tmp_path, "notes.txt")
    assert error_of(str(tmp_path)) == f"is a folder that holds no file ending in {ENDINGS}"


def test_pattern_means_the_data_files_that_it_matches(tmp_path, monkeypatch):
    touch(tmp_path, "a1.jsonl", "a2.jsonl", "a3.txt", ".a4.jsonl", "x/y/a5.jsonl", "b.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("a*") == ["a1.jsonl", "a2.jsonl"]
    assert names("a?.jsonl", "[b].json") == ["a1.jsonl", "a2.jsonl", "b.json"]
    assert names("**/a*.jsonl") == ["a1.jsonl", "a2.jsonl", "x/y/a5.jsonl"]
    assert names("~/b.js*", "~/b.json") == [str(tmp_path / "b.json")] * 2
    assert error_of("c*.jsonl") == f"no file matches this pattern (looked from {tmp_path})"
    assert error_of("*.txt") == f"no file that matches this pattern ends in {ENDINGS}"
    assert error_of("x*") == f"no file matches this pattern (looked from {tmp_path})"


def test_existing_file_is_not_taken_as_a_pattern(tmp_path):
    file, _ = touch(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert names(file) == [file]


def test_unusable_files_are_errors_with_their_name(tmp_path):
    (good,) = touch(tmp_path, "good.jsonl")
    (tmp_path / "empty.parquet").touch()
    (pages,) = touch(tmp_path, "data.pdf")
    cases = {
        str(tmp_path / "none.jsonl"): f"no such file (looked in {tmp_path})",
        f"{good}/x.jsonl": f"no such file (looked in {good})",
        str(tmp_path / "empty.parquet"): "the file is empty; it should hold at least one conversation",
        pages: f"expected a file that ends in {ENDINGS}",
        str(tmp_path / ("x" * 300 + ".jsonl")): "cannot be read (File name too long)",
        "/dev/null": f"is not a regular file; pass a file that ends in {ENDINGS}",
    }
    for value, reason in cases.items():
        assert error_of(value) == reason


def test_empty_file_in_a_folder_is_an_error_with_its_own_name(tmp_path):
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(UserError) as caught:
        resolve_sources([str(tmp_path)], "--data_files")
    reason = "the file is empty; it should hold at least one conversation"
    assert str(caught.value) == f"--data_files {tmp_path}/empty.parquet: {reason}"


@pytest.mark.parametrize(
    "value",
    ["data/train.jsonl", "data/train.parquet", "./a/b", "../a", "/no/such", "~/nothing", "a/b/c/d", "word"],
)
def test_value_that_cannot_be_a_dataset_name_is_a_missing_file(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    folder = Path(os.path.expanduser(value)).absolute().parent
    assert error_of(value) == f"no such file (looked in {folder})"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """Replace every hub dataset by one of 5 rows in 3 files. The list receives the arguments of each call."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(LINE.replace('"q"', f'"q{number}"') + "\n" for number in range(5)))
    cache = str(tmp_path / "cache")
    built = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=cache)
    for shard, (start, stop) in enumerate([(0, 2), (2, 3), (3, 5)]):
        built.select(range(start, stop)).save_to_disk(tmp_path / f"shard{shard}")
    shards = [datasets.load_from_disk(str(tmp_path / f"shard{shard}")) for shard in range(3)]
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        return built if name == "owner/one" else datasets.concatenate_datasets(shards)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


def test_hub_dataset_is_read_from_its_arrow_file(hub):
    (source,) = resolve_sources(["owner/one"], "--data_files")
    assert hub == [("owner/one", None, "train")]
    assert (source.name, source.kind, source.entry, source.rows_before) == ("owner/one:train", "arrow", 0, 0)
    (batch,) = read_batches(source)
    assert [record.line for record in batch.records] == [1, 2, 3, 4, 5]
    assert [json.loads(record.text)["messages"][0]["content"] for record in batch.records] == [
        "q0", "q1", "q2", "q3", "q4",
    ]  # fmt: skip
    assert batch.consumed == source.path.stat().st_size


def test_configuration_and_split_are_part_of_the_value(hub):
    values = ["owner/one:test", "owner/one/main:test", "owner/one/main", "o.w-n_er/na.me"]
    sources = resolve_sources(values, "--data_files")
    assert list(dict.fromkeys(source.name for source in sources)) == [
        "owner/one:test", "owner/one/main:test", "owner/one/main:train", "o.w-n_er/na.me:train",
    ]  # fmt: skip
    assert hub == [
        ("owner/one", None, "test"),
        ("owner/one", "main", "test"),
        ("owner/one", "main", "train"),
        ("o.w-n_er/na.me", None, "train"),
    ]


def test_rows_are_numbered_across_the_files_of_a_split(hub):
    sources = resolve_sources(["owner/three:train"], "--data_files")
    assert [(source.name, source.rows_before) for source in sources] == [
        ("owner/three:train", 0), ("owner/three:train", 2), ("owner/three:train", 3),
    ]  # fmt: skip
    records = [record for source in sources for batch in read_batches(source) for record in batch.records]
    assert [(record.line, json.loads(record.text)["messages"][0]["content"]) for record in records] == [
        (1, "q0"), (2, "q1"), (3, "q2"), (4, "q3"), (5, "q4"),
    ]  # fmt: skip


def test_existing_file_is_not_taken_as_a_hub_dataset(hub, tmp_path):
    touch(tmp_path / "owner" / "one", "a.jsonl")
    assert names("owner/one") == ["owner/one/a.jsonl"]
    assert hub == []


@pytest.mark.parametrize("split", ["train[:10%]", "train+test", "train[5:]"])
def test_slices_and_sums_of_splits_are_errors(hub, split):
    assert error_of(f"owner/one:{split}") == (
        f"{split!r} is not the name of a split; slices and sums of splits are not supported; pass each split "
        "as a separate value, like owner/one:train"
    )
    assert hub == []


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("why\n  it failed"),
        datasets.exceptions.DataFilesNotFoundError("why it failed"),
        datasets.exceptions.DatasetGenerationError("why it failed"),
        OfflineModeIsEnabled("why it failed"),
        ConnectionError("why it failed"),
        httpx.ConnectTimeout("why it failed"),
        ValueError("why it failed"),
        RuntimeError("why it failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_dataset_that_cannot_be_loaded_is_an_error_with_the_reason(tmp_path, monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert error_of("data/train") == (
        f"is neither an existing file (looked in {tmp_path}/data) nor a dataset that could be loaded "
        "(why it failed)"
    )


def test_unknown_dataset_is_an_error_offline_with_the_real_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = error_of("owner/no-such-dataset")
    start = f"is neither an existing file (looked in {tmp_path}/owner) nor a dataset that could be loaded ("
    assert message.startswith(start)
    assert "owner/no-such-dataset" in message.removeprefix(start)
