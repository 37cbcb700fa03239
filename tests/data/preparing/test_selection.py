"""Selection of the training data: weights, duplicates, packing and skipped lines."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from tests.data.rows import Row, column, conversation, numbered, write


def origins(data: PreparedData, split: str = "train") -> list[tuple[int, int]]:
    dataset = data.datasets[split].unpacked()
    return [dataset.origins(row)[0] for row in range(len(dataset))]


def mixed(
    encoder: ChatEncoder, folder: Path, groups: list[list[Row]], weights: tuple[float, ...], **options: object
) -> PreparedData:
    files = [write(folder / f"{number}.jsonl", rows) for number, rows in enumerate(groups)]
    prepare_options = PrepareOptions(**{"max_length": 64, "data_weights": weights, **options})
    return prepare(files, [], encoder, prepare_options, cache_dir=folder / "cache", workers=1)


def test_weights_repeat_files_and_draw_a_seeded_share(encoder, tmp_path):
    groups = [numbered(10), numbered(10, 100), numbered(10, 200)]
    data = mixed(encoder, tmp_path, groups, (1, 0.5, 2.3))
    taken = [Counter(line for file, line in origins(data) if file == number) for number in range(3)]
    assert taken[0] == Counter(range(1, 11))
    assert set(taken[1].values()) == {1} and len(taken[1]) == 5
    assert sorted(taken[2].values()) == [2] * 7 + [3] * 3
    entries = data.report["train"]["files"]
    assert [(entry["conversations"], entry["sequences"]) for entry in entries] == [(10, 10), (5, 5), (10, 23)]
    assert [entry["weight"] for entry in data.report["files"]["train"]] == [1, 0.5, 2.3]
    assert origins(mixed(encoder, tmp_path, groups, (1, 0.5, 2.3))) == origins(data)
    other = mixed(encoder, tmp_path, groups, (1, 0.5, 2.3), seed=1)
    assert origins(other) != origins(data) and Counter(origins(other)).total() == 38


def test_weight_of_a_folder_applies_to_all_its_files(encoder, tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(4):
        write(tmp_path / "many" / f"{number}.jsonl", numbered(5, 10 * number))
    single = write(tmp_path / "z.jsonl", numbered(6, 900))
    options = PrepareOptions(64, data_weights=(0.5, 1))
    data = prepare(
        [str(tmp_path / "many"), single], [], encoder, options, cache_dir=tmp_path / "cache", workers=1
    )
    files = Counter(file for file, _ in origins(data))
    assert files[4] == 6 and sum(files[number] for number in range(4)) == 10


def test_held_out_conversations_are_not_repeated(encoder, tmp_path):
    data = mixed(encoder, tmp_path, [numbered(20)], (3,), validation_split_percentage=20)
    train, held_out = origins(data), origins(data, "eval")
    assert Counter(train).most_common(1)[0][1] == 3 and len(train) == 48
    assert len(held_out) == len(set(held_out)) == 4 and not set(train) & set(held_out)


def test_weights_that_leave_nothing_raise(encoder, tmp_path):
    with pytest.raises(UserError, match="--data_weights 0.01: no conversation is left to train on; raise"):
        mixed(encoder, tmp_path, [numbered(10)], (0.01,))


def test_dedup_keeps_the_first_of_equal_conversations(encoder, tmp_path):
    untrained = conversation("question 1", "answer 1")
    untrained["messages"] = [*untrained["messages"][:1], {**untrained["messages"][1], "train": True}]
    groups = [[*numbered(3), *numbered(3)], [*numbered(4), untrained]]
    assert len(mixed(encoder, tmp_path, groups, ()).datasets["train"]) == 11
    data = mixed(encoder, tmp_path, groups, (), dedup=True)
    assert origins(data) == [(0, 1), (0, 2), (0, 3), (1, 4)]
    assert data.report["repeated_conversations_dropped"] == 7
    assert data.report["conversations_read"] == 11


def test_dedup_keeps_conversations_that_are_supervised_differently(encoder, tmp_path):
    first = numbered(1)[0]["messages"] + numbered(1, 5)[0]["messages"]
    other = [first[0], {**first[1], "train": False}, *first[2:]]
    rows = [{"messages": first}, {"messages": other}, {"messages": first}]
    assert origins(mixed(encoder, tmp_path, [rows], (), dedup=True)) == [(0, 1), (0, 2)]


def test_dedup_counts_eval_conversations_too(prepared):
    data = prepared(numbered(5), [*numbered(2, 3), *numbered(2, 10), *numbered(2, 10)], dedup=True)
    assert data.report["repeated_conversations_dropped"] == 2
    assert data.report["eval_conversations_dropped_because_in_train"] == 2
    assert data.report["eval"]["conversations"] == 2


def test_packed_rows_hold_every_conversation_once_and_untruncated(prepared):
    rows = [conversation(f"question {n}", "word " * (n % 7)) for n in range(1, 60) if n % 7]
    packed = prepared(rows, max_length=64, packing=True, validation_split_percentage=20)
    single = prepared(rows, max_length=64, validation_split_percentage=20)
    for split in ("train", "eval"):
        dataset = packed.datasets[split]
        assert dataset.packed and max(dataset.lengths) <= 64 and len(dataset) < len(single.datasets[split])
        assert sorted(origins(packed, split)) == sorted(origins(single, split))
        by_ids = {tuple(ids) for ids in column(single.datasets[split], "input_ids")}
        for row in dataset:
            ends = [0]
            for length in row["seq_lengths"]:
                ends.append(ends[-1] + length)
                assert tuple(row["input_ids"][ends[-2] : ends[-1]].tolist()) in by_ids
                assert row["labels"][ends[-2]] == -100
            assert ends[-1] == len(row["input_ids"])
    report = packed.report["train"]
    assert report["rows"] == len(packed.datasets["train"])
    assert report["packing_density"] == report["tokens"] / (64 * report["rows"])
    assert report["tokens"] == single.report["train"]["tokens"]


def test_skipped_lines_are_saved_verbatim_with_their_reason(encoder, tmp_path):
    lines = [json.dumps(row).encode() for row in numbered(4)]
    bad = [b'{"messages": [', b'\xff{"a"', b'{"messages": [], "x": "\xc3\xa9"}']
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_bytes(b"\n".join([lines[0], bad[0], lines[1], bad[1], lines[2]]))
    other.write_bytes(b"\n".join([bad[2], lines[3]]))
    options = PrepareOptions(64, on_bad_data="skip")
    files = [str(file), str(other)]
    data = prepare(files, [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert origins(data) == [(0, 1), (0, 3), (0, 5), (1, 2)]
    report = data.report
    assert (report["conversations_read"], report["rejected"]) == (7, 3)
    assert [(entry["read"], entry["rejected"]) for entry in report["files"]["train"]] == [(5, 2), (2, 1)]
    data.write_report(tmp_path / "out")
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open(encoding="utf-8")]
    assert [(row["file"], row["line"]) for row in rejected] == [(files[0], 2), (files[0], 4), (files[1], 1)]
    assert rejected[0]["text"].encode() == bad[0] and rejected[2]["text"].encode() == bad[2]
    assert rejected[1]["base64"] == "/3siYSI=" and rejected[1]["reason"].startswith("not valid UTF-8")
    assert report["rejected_by_reason"]["broken JSON"] == 1
    again = prepare(files, [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert again.report == report


def test_rejected_lines_of_a_file_whose_name_is_not_utf8_are_saved(encoder, tmp_path):
    file = tmp_path / "caf\udce9.jsonl"
    file.write_text("{\n" + json.dumps(numbered(1)[0]))
    options = PrepareOptions(64, on_bad_data="skip")
    data = prepare([str(file)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    data.write_report(tmp_path / "out")
    (row,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert row["file"] == str(file) and row["line"] == 1 and row["text"] == "{"


def test_files_without_a_usable_line_raise_with_the_reasons(encoder, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{\n{\n[]\n")
    options = PrepareOptions(64, on_bad_data="skip")
    with pytest.raises(UserError, match=r"none of the 3 .* can be used \(2 x broken JSON; 1 x not a"):
        prepare([str(file)], [], encoder, options, cache_dir=tmp_path, workers=1)


def test_bad_rows_and_blank_files_are_skipped_but_a_broken_file_raises(encoder, tmp_path):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table, blank, broken = tmp_path / "a.parquet", tmp_path / "b.jsonl", tmp_path / "c.json"
    raw = pa.array([b"q", b"\xff", b"r"]).view(pa.string())
    pq.write_table(pa.table({"prompt": raw, "completion": ["x", "y", "z"]}), table)
    blank.write_text("\n\n")
    broken.write_text(json.dumps([{"messages": good}] * 3)[:-30])
    options = PrepareOptions(64, on_bad_data="skip")
    files = [str(table), str(blank)]
    data = prepare(files, [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert origins(data) == [(0, 1), (0, 3)] and data.report["rejected"] == 2
    with pytest.raises(UserError, match=r"c.json:1: .*the rest of the file cannot be read"):
        prepare([*files, str(broken)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)


def test_conversations_not_drawn_are_counted(encoder, tmp_path):
    data = mixed(encoder, tmp_path, [numbered(20), numbered(20, 100)], (0.5, 2), max_train_samples=15)
    assert data.report["conversations_read"] == 40
    used = data.report["train"]["conversations"]
    assert data.report["conversations_not_drawn"] == 40 - used


def test_conversations_that_differ_beyond_the_limit_are_not_duplicates(prepared):
    rows = [conversation("q", "word " * 30 + str(number)) for number in range(5)]
    data = prepared(rows[:3], rows[3:], dedup=True, max_length=20)
    assert data.report["repeated_conversations_dropped"] == 0
    assert [data.report[split]["conversations"] for split in ("train", "eval")] == [3, 2]


def test_only_the_last_turn_is_supervised_if_chosen(prepared):
    messages = conversation("q", "one")["messages"] + conversation("r", "two")["messages"]
    both = prepared([{"messages": messages}])
    last = prepared([{"messages": messages}], train_on_last_turn_only=True)
    (all_labels,), (labels,) = (column(data.datasets["train"], "labels") for data in (both, last))
    supervised = [label for label in labels if label != -100]
    assert [label for label in all_labels if label != -100][-len(supervised) :] == supervised
    assert last.report["end_of_turn_tokens"] == {"<|im_end|>": 1}
    assert both.report["end_of_turn_tokens"] == {"<|im_end|>": 2}
    assert column(both.datasets["train"], "input_ids") == column(last.datasets["train"], "input_ids")
