"""Preparation of data files: contents, truncation, splits, counts and errors."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from datasets import Dataset

from dft.data.preparing import encode as encode_module
from dft.data.preparing import prepare as prepare_module
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from tests.data.rows import column, conversation, numbered, write
from tests.data.templates.chat_templates import FORGETS_REASONING, Supervised, expected, with_template


def questions(data: PreparedData, split: str, encoder: ChatEncoder) -> list[str]:
    """Return the question of every sequence, in order."""
    texts = [encoder.tokenizer.decode(ids) for ids in column(data.datasets[split], "input_ids")]
    return [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts]


def check_counts(data: PreparedData, split: str) -> None:
    """Check that the report of a split agrees with the prepared data."""
    report, dataset = data.report[split], data.datasets[split]
    assert report["sequences"] == len(dataset) == sum(entry["sequences"] for entry in report["files"])
    ids, labels = column(dataset, "input_ids"), column(dataset, "labels")
    tokens = sum(map(len, ids))
    assert report["tokens"] == tokens == sum(entry["tokens"] for entry in report["files"])
    supervised = sum(label != -100 for row in labels for label in row)
    assert report["supervised_tokens"] == supervised == sum(e["supervised_tokens"] for e in report["files"])
    assert report["length_percentiles"]["100"] == max(map(len, ids))
    assert report["length_percentiles"]["0"] == min(map(len, ids))


def test_prepared_file_opens_with_datasets_and_holds_the_origin_of_sequences(prepared, encoder):
    data = prepared(numbered(3), numbered(2, start=10))
    loaded = Dataset.from_file(f"{data.report['prepared_path']}/train.arrow")
    assert loaded.column_names == ["input_ids", "labels", "source", "line", "part", "reason"]
    ids, labels = expected(
        encoder.tokenizer, "<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n",
        Supervised("answer 1<|im_end|>"), "\n",
    )  # fmt: skip
    origin = {"source": 0, "line": 2, "part": 0, "reason": ""}
    assert loaded[1] == {"input_ids": ids, "labels": labels, **origin}
    row = data.datasets["train"][1]
    assert (row["input_ids"].tolist(), row["labels"].tolist()) == (ids, labels)
    assert data.datasets["train"].origins(1) == [(0, 2)]
    assert str(data.path) == data.report["prepared_path"]


def test_no_eval_split_by_default(prepared):
    data = prepared(numbered(3))
    assert set(data.datasets) == {"train"} and "eval" not in data.report


def test_files_with_different_columns_are_merged_in_order(encoder, tmp_path):
    files = [
        write(tmp_path / "a.jsonl", [conversation("one", id=1, meta={"x": [1, "y"]})]),
        write(tmp_path / "b.jsonl", [conversation("two", id="two"), conversation("three", score=0.5)]),
    ]
    array = tmp_path / "c.json"
    array.write_text(json.dumps([conversation("four", meta="text")], indent=1))
    options = PrepareOptions(max_length=64)
    files = [*files, str(array)]
    data = prepare(files, [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert questions(data, "train", encoder) == ["one", "two", "three", "four"]
    entries = data.report["train"]["files"]
    assert [entry["file"] for entry in entries] == files
    assert [entry["conversations"] for entry in entries] == [1, 2, 1]
    check_counts(data, "train")


def test_file_given_twice_is_read_twice(encoder, tmp_path):
    file = write(tmp_path / "a.jsonl", numbered(3))
    options = PrepareOptions(max_length=64)
    data = prepare([file, file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    entries = data.report["train"]["files"]
    assert [(entry["file"], entry["conversations"]) for entry in entries] == [(file, 3), (file, 3)]
    assert data.report["train"]["different_conversations"] == 3


LONG_ROWS = (conversation("short", "yes"), conversation("q", "word " * 30), conversation("word " * 60, "no"))
"""A limit of 20 tokens truncates the second row in its answer and the third in its question."""


def test_long_conversations_are_truncated_on_the_right_and_counted(prepared):
    data, untruncated = prepared([*LONG_ROWS], max_length=20), prepared([*LONG_ROWS], max_length=1000)
    for name in ("input_ids", "labels"):
        rows = column(untruncated.datasets["train"], name)
        assert column(data.datasets["train"], name) == [row[:20] for row in rows[:2]]
    lost = untruncated.report["train"]["supervised_tokens"] - data.report["train"]["supervised_tokens"]
    numbers = {name: data.report[name] for name in data.report if isinstance(data.report[name], int)}
    assert numbers == {
        "conversations_read": 3,
        "rejected": 0,
        "dropped_without_supervised_tokens": 1,
        "dropped_for_their_length": 0,
        "truncated_conversations": 1,
        "lost_supervised_tokens": lost,
        "lost_end_tokens": 2,
        "repeated_conversations_dropped": 0,
        "eval_conversations_dropped_because_in_train": 0,
        "conversations_not_drawn": 0,
        "turns_without_stop_token": 0,
        "unknown_tokens": 0,
    }
    assert data.report["end_of_turn_tokens"] == {"<|im_end|>": 1}
    check_counts(data, "train")


def test_left_truncation_keeps_the_end_and_does_not_supervise_the_first_token(prepared):
    data = prepared([*LONG_ROWS], max_length=20, truncation="left")
    untruncated = prepared([*LONG_ROWS], max_length=1000)
    rows = column(untruncated.datasets["train"], "input_ids")
    assert column(data.datasets["train"], "input_ids") == [row[-20:] for row in rows]
    labels = column(untruncated.datasets["train"], "labels")
    assert column(data.datasets["train"], "labels") == [
        row if len(row) <= 20 else [-100, *row[-19:]] for row in labels
    ]
    lost = untruncated.report["train"]["supervised_tokens"] - data.report["train"]["supervised_tokens"]
    assert (data.report["lost_supervised_tokens"], data.report["lost_end_tokens"]) == (lost, 0)
    assert (data.report["truncated_conversations"], data.report["end_of_turn_tokens"]) == (
        2,
        {"<|im_end|>": 3},
    )


def test_turn_truncated_on_the_left_loses_its_end_token(prepared):
    messages = conversation("q", "one")["messages"] + conversation("r", "word " * 10)["messages"]
    (length,) = map(len, column(prepared([{"messages": messages}]).datasets["train"], "input_ids"))
    for limit, lost in ((length, 0), (length - 3, 0), (20, 1)):
        report = prepared([{"messages": messages}], max_length=limit, truncation="left").report
        assert (report["lost_end_tokens"], report["end_of_turn_tokens"]) == (lost, {"<|im_end|>": 2 - lost})


def test_long_conversations_are_dropped_or_raise_as_chosen(prepared, tmp_path):
    data = prepared([*LONG_ROWS], max_length=20, truncation="drop")
    untruncated = prepared([*LONG_ROWS], max_length=1000)
    expected_ids = column(untruncated.datasets["train"], "input_ids")[:1]
    assert column(data.datasets["train"], "input_ids") == expected_ids
    report = data.report
    assert (report["dropped_for_their_length"], report["truncated_conversations"]) == (2, 0)
    supervised = untruncated.report["train"]["supervised_tokens"] - report["train"]["supervised_tokens"]
    assert (report["lost_supervised_tokens"], report["lost_end_tokens"]) == (supervised, 2)
    lengths = [len(ids) for ids in column(untruncated.datasets["train"], "input_ids")]
    with pytest.raises(UserError) as raised:
        prepared([*LONG_ROWS], max_length=20, truncation="error")
    assert str(raised.value).splitlines() == [
        "2 conversations cannot be used:",
        f"  {tmp_path}/train.jsonl:2: {lengths[1]} tokens, longer than --max_length 20",
        f"  {tmp_path}/train.jsonl:3: {lengths[2]} tokens, longer than --max_length 20",
    ]


def test_conversation_of_exactly_the_limit_is_not_truncated(prepared):
    (length,) = prepared([conversation("q")]).datasets["train"].lengths.tolist()
    assert prepared([conversation("q")], max_length=length).report["truncated_conversations"] == 0
    assert prepared([conversation("q")], max_length=length - 1).report["truncated_conversations"] == 1


def test_conversation_of_several_sequences_counts_once_and_stays_in_one_split(tokenizer_json, tmp_path):
    encoder = ChatEncoder(with_template(tokenizer_json, FORGETS_REASONING, eos_token="<|im_end|>"))
    thought = "<think>\nlet me\n</think>\n\nb"
    rows = [
        {"messages": conversation(f"{n}", thought)["messages"] + conversation("more", thought)["messages"]}
        for n in range(9)
    ]
    file = write(tmp_path / "a.jsonl", rows)
    options = PrepareOptions(max_length=200, validation_split_percentage=33)
    data = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert [data.report[split]["conversations"] for split in ("train", "eval")] == [6, 3]
    assert [len(data.datasets[split]) for split in ("train", "eval")] == [12, 6]
    sides = [set(questions(data, split, encoder)) for split in ("train", "eval")]
    assert len(sides[0]) == 6 and len(sides[1]) == 3 and not sides[0] & sides[1]
    check_counts(data, "eval")


def test_conversation_that_loses_some_of_its_sequences_counts_once(tokenizer_json, tmp_path):
    encoder = ChatEncoder(with_template(tokenizer_json, FORGETS_REASONING, eos_token="<|im_end|>"))
    short, long = "<think>\na\n</think>\n\nb", "<think>\n" + "word " * 40 + "\n</think>\n\nb"
    messages = conversation("q", short)["messages"] + conversation("r", long)["messages"]
    file = write(tmp_path / "a.jsonl", [{"messages": messages}, conversation("s", long)])
    options = PrepareOptions(max_length=60, truncation="drop")
    report = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1).report
    assert report["train"]["conversations"] == report["truncated_conversations"] == 1
    assert report["dropped_for_their_length"] == 1 and report["conversations_read"] == 2
    assert report["files"]["train"] == [
        {"file": file, "read": 2, "rejected": 0, "dropped": 1, "truncated": 1, "weight": 1}
    ]


def test_validation_split_is_seeded_disjoint_and_complete(prepared, encoder):
    rows = numbered(50)
    first = prepared(rows, validation_split_percentage=10, seed=1)
    assert len(first.datasets["eval"]) == 5
    train, held_out = questions(first, "train", encoder), questions(first, "eval", encoder)
    assert sorted(train + held_out) == sorted(f"question {number}" for number in range(50))
    assert train == sorted(train, key=lambda text: int(text.split()[1]))
    other = prepared(rows, validation_split_percentage=10, seed=2)
    assert set(questions(other, "eval", encoder)) != set(held_out)
    with_extra = prepared([*rows, conversation("extra")], validation_split_percentage=10, seed=1)
    assert with_extra.path != first.path
    for name in ("train", "eval"):
        check_counts(first, name)


def test_same_seed_gives_the_same_split_in_a_new_cache(encoder, tmp_path):
    file = write(tmp_path / "a.jsonl", numbered(40))
    options = PrepareOptions(max_length=64, validation_split_percentage=20)
    first, second = (
        prepare([file], [], encoder, options, cache_dir=tmp_path / name, workers=1) for name in ("x", "y")
    )
    assert first.path != second.path
    assert column(first.datasets["eval"], "input_ids") == column(second.datasets["eval"], "input_ids")


def test_order_of_lines_does_not_change_which_conversations_are_held_out(prepared, encoder):
    rows = numbered(40)
    held_out = [
        set(questions(prepared(lines, validation_split_percentage=20), "eval", encoder))
        for lines in (rows, rows[::-1])
    ]
    assert held_out[0] == held_out[1]


def test_copies_of_a_conversation_go_to_the_same_split(prepared, encoder):
    rows = numbered(10) * 3
    random.Random(0).shuffle(rows)
    data = prepared(rows, validation_split_percentage=30)
    train, held_out = questions(data, "train", encoder), questions(data, "eval", encoder)
    assert len(train) == 21 and len(held_out) == 9 and not set(train) & set(held_out)
    assert data.report["eval"]["conversations"] == 9 and data.report["eval"]["different_conversations"] == 3


def test_at_least_one_conversation_is_held_out(prepared):
    data = prepared(numbered(10), validation_split_percentage=0.5)
    assert len(data.datasets["eval"]) == 1 and len(data.datasets["train"]) == 9


def test_validation_split_that_leaves_nothing_to_train_on_raises(prepared):
    with pytest.raises(UserError, match="--validation_split_percentage 90: of 3 different conversations 3 "):
        prepared(numbered(3), validation_split_percentage=90)


def test_eval_files_replace_the_split_and_lose_conversations_in_the_training_files(prepared, encoder):
    data = prepared(numbered(10), numbered(6, start=8), validation_split_percentage=50)
    assert len(data.datasets["train"]) == 10
    assert questions(data, "eval", encoder) == [f"question {number}" for number in range(10, 14)]
    assert data.report["eval_conversations_dropped_because_in_train"] == 2
    assert data.report["conversations_read"] == 16
    assert data.report["eval"]["conversations"] == 4
    check_counts(data, "eval")


def test_eval_files_without_new_conversations_raise(prepared):
    with pytest.raises(UserError, match="--eval_data_files: all 2 conversations are in the training files"):
        prepared(numbered(5), numbered(2))


def test_sample_limits_draw_sequences_by_seed_and_change_the_report(prepared, encoder):
    rows, eval_rows = numbered(30), numbered(20, start=100)
    data = prepared(rows, eval_rows, max_train_samples=7, max_eval_samples=4)
    chosen = questions(data, "train", encoder)
    assert len(chosen) == 7 and len(set(chosen)) == 7 and len(data.datasets["eval"]) == 4
    assert chosen == sorted(chosen, key=lambda text: int(text.split()[1]))
    for name in ("train", "eval"):
        check_counts(data, name)
    assert data.report["train"]["conversations"] == 7
    assert questions(prepared(rows, eval_rows, max_train_samples=7, seed=3), "train", encoder) != chosen
    assert len(prepared(rows, eval_rows, max_train_samples=1000).datasets["train"]) == 30


def test_files_without_supervised_tokens_within_the_limit_raise(prepared):
    with pytest.raises(UserError, match=r"--data_files: none of the 3 .* --max_length 4; raise it"):
        prepared(numbered(3), max_length=4)
    with pytest.raises(UserError, match=r"--eval_data_files: none of the 1 .* --max_length 20"):
        prepared(numbered(3), [conversation("word " * 100)], max_length=20)


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_lines_of_all_files_are_reported_together_in_order(prepared, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(encode_module, "SMALL", 0)
    rows = [*numbered(300), {"body": "x"}, conversation("q", ""), *numbered(300)]
    with pytest.raises(UserError) as raised:
        prepared(rows, [{"messages": []}], workers=workers)
    assert str(raised.value).splitlines() == [
        "3 conversations cannot be used:",
        f"  {tmp_path}/train.jsonl:301: no conversation; the keys are ['body'], expected 'messages', "
        "'conversations', 'conversation', 'instruction' with 'output', 'response' or 'prompt' with "
        "'completion'; --columns NAME=COLUMN reads a column under another name",
        f"  {tmp_path}/train.jsonl:302: messages[1]: empty assistant turn",
        f"  {tmp_path}/eval.jsonl:1: 'messages' must be a list of at least one turn, got an empty list",
    ]
    suffixes = {path.suffix for path in (tmp_path / "cache").iterdir() if path.is_file()}
    assert suffixes == {".lock", ".error"}, "a failed preparation leaves no data"
    assert not multiprocessing.active_children()


def test_file_without_conversations_raises(encoder, tmp_path):
    good, empty = write(tmp_path / "a.jsonl", numbered(1)), tmp_path / "b.json"
    empty.write_text("[]")
    with pytest.raises(UserError, match=f"{empty}:1: there is no conversation in this file"):
        prepare([good, str(empty)], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)


def test_template_that_renders_no_answer_raises_with_the_line(tokenizer_json, tmp_path):
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    encoder = ChatEncoder(with_template(tokenizer_json, template, eos_token="<|im_end|>"))
    file = write(tmp_path / "a.jsonl", numbered(2))
    with pytest.raises(UserError, match="a.jsonl:2: the chat template does not render the content of a"):
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)


def test_missing_files_raise_before_any_work(encoder, tmp_path):
    with pytest.raises(UserError, match="--data_files nowhere.jsonl: no such file"):
        prepare(["nowhere.jsonl"], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)
    assert not (tmp_path / "cache").exists()


def test_cache_folder_that_cannot_be_written_raises(encoder, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", numbered(1))
    for folder in (Path(file), Path(file) / "below"):
        with pytest.raises(UserError, match=f"--data_cache_dir {folder}: is not a folder"):
            prepare([file], [], encoder, PrepareOptions(64), cache_dir=folder, workers=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "encode_sources", full)
    with pytest.raises(UserError, match="no space left on the device"):
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)
