"""Named evaluation sets: their names, and that each is prepared by itself."""

import pytest

from dft.data.preparing.evaluation_sets import parse_evaluation_files, splits_of
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.errors import UserError
from dft.report.terminal.data import data_summary
from tests.data.rows import numbered, write


@pytest.mark.parametrize(
    ("values", "files", "splits"),
    [
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], ["eval", "eval"]),
        (["math=a.jsonl", "x-1.b=c=d.jsonl"], ["a.jsonl", "c=d.jsonl"], ["eval_math", "eval_x-1.b"]),
        (["./year=1/a.jsonl", "owner/name:test"], ["./year=1/a.jsonl", "owner/name:test"], ["eval", "eval"]),
        ([], [], []),
    ],
)
def test_a_name_stands_before_the_first_equals_sign(values, files, splits):
    sets = parse_evaluation_files(values)
    assert sets.files == files and sets.splits() == splits


def test_a_file_that_exists_has_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3.jsonl").touch()
    assert parse_evaluation_files(["lr=3.jsonl"]).names == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["a=x", "a=y"],
            "2 evaluation sets have the name 'a'; give each its own name, or one name to a fo",
        ),
        (["a=x", "y"], "--eval_data_files y: has no name, and other evaluation sets have; name all of them"),
        (["a b=x"], "--eval_data_files a b=x: 'a b' cannot name an evaluation set; use letters"),
        (["=x"], "'' cannot name an evaluation set"),
        (["a_=x"], "'a_' cannot name an evaluation set"),
        (["a="], "--eval_data_files a=: no file follows the name; write a=FILE"),
        (["x_aux=y"], "x_aux_loss would read as the metric aux_loss; choose another name"),
    ],
)
def test_names_that_cannot_be_used_are_one_error(values, message):
    with pytest.raises(UserError) as raised:
        parse_evaluation_files(values)
    assert message in str(raised.value)


@pytest.fixture
def prepared(encoder, tmp_path):
    train = write(tmp_path / "train.jsonl", numbered(30))

    def make(*values: str, **options: object) -> PreparedData:
        settings = PrepareOptions(**{"max_length": 64, **options})
        return prepare([train], list(values), encoder, settings, cache_dir=tmp_path / "cache", workers=1)

    return make


def test_each_set_is_prepared_by_itself(prepared, tmp_path):
    """Conversations 100 to 102 are in both sets, and stay in both; those of the training file leave each."""
    math = write(tmp_path / "math.jsonl", [*numbered(5, 100), *numbered(5, 100), *numbered(2)])
    code = write(tmp_path / "code.jsonl", [*numbered(3, 100), *numbered(4, 200), *numbered(1)])
    data = prepared(f"math={math}", f"code={code}", dedup="True")
    assert list(data.datasets) == splits_of(data.report) == ["train", "eval_math", "eval_code"]
    assert {name: len(dataset) for name, dataset in data.evaluation.items()} == {"math": 5, "code": 7}
    assert data.report["eval_conversations_dropped_because_in_train"] == 3
    assert data.report["repeated_conversations_dropped"] == 5
    for name, file in (("eval_math", math), ("eval_code", code)):
        assert [entry["file"] for entry in data.report[name]["files"]] == [file]
        assert {entry["file"] for entry in data.report[name]["longest"]} == {file}
    lines = data_summary(data.report)
    assert sum(line.startswith(("eval_math   5 conv", "eval_code   7 conv")) for line in lines) == 2


def test_the_sample_limit_is_of_each_set(prepared, tmp_path):
    math, code = (write(tmp_path / f"{n}.jsonl", numbered(9, n)) for n in (100, 200))
    data = prepared(f"math={math}", f"code={code}", max_eval_samples=4)
    assert [len(dataset) for dataset in data.evaluation.values()] == [4, 4]


def test_renamed_sets_are_prepared_again_and_equal_ones_are_not(prepared, tmp_path):
    file = write(tmp_path / "math.jsonl", numbered(5, 100))
    paths = [prepared(value).path for value in (f"a={file}", f"a={file}", f"b={file}", file)]
    assert paths[0] == paths[1] and len(set(paths)) == 3


def test_a_set_without_usable_conversations_is_named(prepared, tmp_path):
    math, same = (write(tmp_path / f"{n}.jsonl", numbered(3, n)) for n in (100, 0))
    with pytest.raises(UserError, match="--eval_data_files same=...: all 3 conversations are in the train"):
        prepared(f"math={math}", f"same={same}")


def test_conversations_nearly_equal_one_for_training_are_counted_by_set(encoder, tmp_path):
    text = "A long text about the weather in the mountains and what to wear for a walk there in winter. " * 4
    rows = [
        [
            {
                "messages": [
                    {"role": "user", "content": text + number},
                    {"role": "assistant", "content": text},
                ]
            }
        ]
        for number in ("one", "two")
    ]
    train, close = (write(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(rows))
    other = write(tmp_path / "other.jsonl", numbered(3, 100))
    data = prepare(
        [train], [f"other={other}", f"close={close}"], encoder, PrepareOptions(4096),
        cache_dir=tmp_path / "cache", workers=1,
    )  # fmt: skip
    (warning,) = (entry for entry in data.report["warnings"] if "nearly equal" in entry["text"])
    assert warning["text"] == "evaluation conversations of the set 'close' nearly equal one for training"
    assert warning["examples"] == [f"{close}:1"]
