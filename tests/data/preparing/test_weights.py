"""Weights of rows and turns in the prepared data: tokens, truncation, packing, duplicates and the report."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator, loss_weights_of
from dft.data.preparing import encoded_sequences
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import prepare
from dft.report.terminal.data import data_summary, show_sequences
from tests.data.rows import conversation, numbered


def turns(*weights: float) -> dict[str, object]:
    messages = []
    for number, weight in enumerate(weights):
        messages.append({"role": "user", "content": f"question {number}"})
        messages.append({"role": "assistant", "content": f"answer {number}", "weight": weight})
    return {"messages": messages}


def weights_of_targets(row: dict[str, np.ndarray]) -> list[float]:
    """Return the weights of the supervised tokens of a row, without repetitions."""
    weights = row["loss_weights"][row["labels"] != -100]
    return [weights[0], *weights[1:][np.diff(weights) != 0]]


def test_tokens_have_the_weight_of_their_turn_times_that_of_the_row(prepared):
    data = prepared(
        [conversation("q"), {**turns(0.5, 1, 4), "weight": 0.5}, turns(0.5, 0, 2)], max_length=512
    )
    plain, both, unsupervised = data.datasets["train"]
    assert "loss_weights" not in plain
    assert weights_of_targets(both) == [0.25, 0.5, 2]
    assert weights_of_targets(unsupervised) == [0.5, 2]  # a turn of weight 0 has no target
    assert both["loss_weights"].dtype == np.float32 and len(both["loss_weights"]) == len(both["input_ids"])


def test_data_without_other_weights_than_1_is_stored_as_without_weights(prepared, tmp_path):
    plain = prepared(numbered(3))
    with_ones = prepared([{**row, "weight": 1.0} for row in numbered(3)])
    files = [(data.path / "train.arrow").read_bytes() for data in (plain, with_ones)]
    assert files[0] == files[1] and plain.path != with_ones.path
    assert "loss_weights" not in with_ones.report["train"]


def test_weight_0_prepares_the_same_data_as_no_supervision(prepared):
    weighted, switched = turns(1, 0, 1), turns(1, 1, 1)
    switched["messages"][3] = {**switched["messages"][3], "train": False, "weight": 0}
    files = [(prepared([row]).path / "train.arrow").read_bytes() for row in (weighted, switched)]
    assert files[0] == files[1]
    data = prepared([conversation("a"), {**conversation("b"), "weight": 0}])
    assert data.report["train"]["conversations"] == 1 and data.report["rows_left_out"] == {"weight 0": 1}
    assert "left out    1 row by weight 0" in data_summary(data.report)


def test_a_weight_in_a_later_batch_of_the_file_adds_the_column_to_the_earlier_ones(prepared, monkeypatch):
    monkeypatch.setattr(encoded_sequences, "BATCH_TOKENS", 1)
    rows = [*numbered(5000), {**conversation("q"), "weight": 0.5}, conversation("r")]
    data = prepared(rows, workers=0)
    loaded = Dataset.from_file(str(data.path / "train.arrow"))
    assert loaded.column_names[-1] == "loss_weights" and len(loaded) == 5002
    assert [index for index, weights in enumerate(loaded["loss_weights"]) if weights] == [5000]
    dataset = data.datasets["train"]
    assert "loss_weights" not in dataset[3] and weights_of_targets(dataset[5000]) == [0.5]
    assert {path.suffix for path in data.path.iterdir()} == {".arrow", ".json", ".npy"}


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_cuts_the_weights_with_the_tokens(prepared, side):
    whole = prepared([turns(0.5, 2, 3)], max_length=512).datasets["train"][0]
    cut = prepared([turns(0.5, 2, 3)], max_length=30, truncation=side).datasets["train"][0]
    span = slice(30) if side == "right" else slice(len(whole["input_ids"]) - 30, None)
    assert np.array_equal(cut["input_ids"], whole["input_ids"][span])
    assert np.array_equal(cut["loss_weights"], whole["loss_weights"][span])


def test_packed_rows_hold_the_weights_of_their_sequences(prepared):
    rows = [conversation("a"), {**conversation("b"), "weight": 0.5}, conversation("c")]
    data = prepared(rows, packing=True, max_length=512).datasets["train"]
    (row,) = data
    assert sorted(set(row["loss_weights"][row["labels"] != -100])) == [0.5, 1]
    starts = np.cumsum([0, *row["seq_lengths"]])
    for (_, line), start, end in zip(row["origins"], starts, starts[1:], strict=False):
        targets = row["labels"][start:end] != -100
        assert set(row["loss_weights"][start:end][targets]) == {0.5 if line == 2 else 1.0}
    assert "loss_weights" not in prepared([conversation("a")] * 3, packing=True).datasets["train"][0]


def test_conversations_that_differ_in_weight_are_no_duplicates_but_share_a_split(prepared):
    rows = [{**conversation(f"q{index // 2}"), "weight": 1 + index % 2} for index in range(20)]
    data = prepared([*rows, rows[1]], dedup=True, validation_split_percentage=50)
    assert data.report["repeated_conversations_dropped"] == 1
    lines = {
        name: {dataset.origins(row)[0][1] for row in range(len(dataset))}
        for name, dataset in data.datasets.items()
    }
    assert len(lines["train"]) == len(lines["eval"]) == 10
    assert all((line + 1 if line % 2 else line - 1) in lines["eval"] for line in lines["eval"])


def test_the_report_counts_supervised_tokens_by_weight(prepared):
    rows = [conversation("a"), {**turns(0.5, 2), "weight": 1}, {**conversation("b"), "weight": 0.5}]
    data = prepared([*rows, conversation("c")], max_length=512)
    expected: dict[str, int] = {}
    for row in data.datasets["train"]:
        weights = row.get("loss_weights", np.ones(len(row["labels"])))
        for weight in weights[row["labels"] != -100]:
            expected[f"{weight:g}"] = expected.get(f"{weight:g}", 0) + 1
    report = data.report["train"]["loss_weights"]
    assert report["tokens"] == expected and report["different"] == 3
    mean = sum(float(weight) * count for weight, count in expected.items()) / sum(expected.values())
    assert report["mean"] == pytest.approx(mean)
    assert sum(expected.values()) == data.report["train"]["supervised_tokens"]
    (line,) = (line for line in data_summary(data.report) if "by weight" in line)
    assert line.strip() == (
        f"supervised tokens by weight: {expected['0.5']} of 0.5, {expected['2']} of 2, {expected['1']} of 1; "
        f"mean weight {mean:.3g}"
    )


@pytest.mark.parametrize(("weight", "warns"), [(4.9, False), (80, True), (0.21, False), (0.19, True)])
def test_weights_with_a_mean_far_from_1_are_warned_about(prepared, weight, warns):
    data = prepared([{**conversation("a"), "weight": weight}])
    warnings = [line for line in data_summary(data.report) if line.startswith("warning")]
    assert (
        any(f"the mean weight of the supervised tokens is {weight:g}:" in line for line in warnings) == warns
    )


@pytest.mark.parametrize("kind", ["csv", "parquet", "dataset_info"])
def test_tables_and_descriptions_hold_weights(encoder, tmp_path, kind):
    rows = [
        {"instruction": f"q{n}", "output": f"a{n}", "weight": weight} for n, weight in enumerate((1, 0.5))
    ]
    path = f"{tmp_path}/a.{kind}"
    if kind == "csv":
        (tmp_path / "a.csv").write_text("instruction,output,weight\nq0,a0,1\nq1,a1,0.5\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "weight": float(row["weight"])} for row in rows]), path)
    else:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        columns = {"prompt": "instruction", "response": "output"}
        entry = {"file_name": "rows.json", "columns": columns}
        (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
        path = f"{tmp_path}/dataset_info.json:mine"
    options = PrepareOptions(max_length=64)
    data = prepare([path], [], encoder, options, cache_dir=tmp_path / "cache", workers=0)
    plain, weighted = data.datasets["train"]
    assert "loss_weights" not in plain and weights_of_targets(weighted) == [0.5]
    assert data.report["unread_columns"] == {}


def test_the_report_counts_the_repetitions_of_data_weights(prepared):
    data = prepared([{**conversation("a"), "weight": 0.5}, conversation("a")], data_weights=(3,))
    tokens = data.report["train"]["loss_weights"]["tokens"]
    assert tokens["0.5"] == tokens["1"] == data.report["train"]["supervised_tokens"] / 2


def test_a_sequence_is_shown_with_the_weights_of_its_turns(prepared, encoder):
    dataset = prepared([turns(0.5, 1)], max_length=512).datasets["train"]
    lines = show_sequences(dataset, encoder.tokenizer).splitlines()
    assert "completion 1, weight 0.5" in lines and "completion 2" in lines


@pytest.mark.parametrize("collator", [PaddedCollator(9), PackedCollator(9), FlatCollator()])
def test_batches_hold_weights_only_if_an_example_has_them(collator):
    plain = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert "loss_weights" not in collator([plain, plain])
    batch = collator([plain, {"input_ids": [4, 5], "labels": [-100, 5], "loss_weights": [1, 0.3]}])
    weights = loss_weights_of(batch)
    assert weights.shape == batch["labels"].shape and batch["loss_weights"].is_floating_point() is False
    assert weights[batch["labels"] != -100].tolist() == pytest.approx([1, 1, 0.3])


@pytest.mark.parametrize("collator", [PaddedCollator(9), PackedCollator(9), FlatCollator()])
def test_an_example_of_weight_0_equals_one_that_is_not_supervised(collator):
    example = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "loss_weights": [1, 0, 1]}
    batch = collator([example])
    expected = collator([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}])
    for name in ("input_ids", "labels", "loss_positions", "sequence_ids"):
        assert torch.equal(batch[name], expected[name])


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [1, np.nan, 1], [[1, 1, 1]]])
def test_weights_that_do_not_match_the_tokens_raise(weights):
    with pytest.raises(ValueError, match="must be 3 numbers of at least 0"):
        PaddedCollator(9)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "loss_weights": weights}])
