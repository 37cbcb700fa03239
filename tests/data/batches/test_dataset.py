"""Dataset of prepared sequences: packed and unpacked rows across record batches of the Arrow file."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dft.data.batches.dataset import SCHEMA, Sequences

PARTS = (0, 0, 1, 2, 3, 0, 1)
"""Index of each sequence of `store` in its conversation."""


@pytest.fixture
def store(tmp_path) -> Path:
    """Seven sequences of 1 to 7 tokens in record batches of three; token k of sequence n is 10 * n + k."""
    path = tmp_path / "some.arrow"
    rows = [
        {
            "input_ids": [10 * number + k for k in range(number + 1)],
            "labels": [-100] + [10 * number + k for k in range(1, number + 1)],
            "source": number % 2,
            "line": 100 + number,
            "part": PARTS[number],
            "reason": "changed" if PARTS[number] else "",
        }
        for number in range(7)
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
        for start in (0, 3, 6):
            stream.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 3], schema=SCHEMA))
    return path


def test_rows_follow_the_given_order(store):
    dataset = Sequences(store, np.array([6, 0, 3, 3]))
    assert [row["input_ids"].tolist() for row in dataset] == [
        [60, 61, 62, 63, 64, 65, 66], [0], [30, 31, 32, 33], [30, 31, 32, 33],
    ]  # fmt: skip
    assert dataset[2]["labels"].tolist() == [-100, 31, 32, 33] and dataset[2]["origins"].tolist() == [
        [1, 103]
    ]
    assert set(dataset[2]) == {"input_ids", "labels", "origins"}
    assert dataset[0]["input_ids"].dtype == dataset[0]["labels"].dtype == np.int32
    assert dataset.lengths.tolist() == [7, 1, 4, 4] and len(dataset) == 4 and not dataset.packed
    assert dataset.origins(2) == [(1, 103)]
    for row in (4, -1):
        with pytest.raises(IndexError):
            dataset[row]


def test_part_of_a_conversation_is_counted_across_record_batches(store):
    dataset = Sequences(store, np.arange(7))
    assert [dataset.part(row)[:2] for row in range(7)] == [
        (1, 1), (1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2),
    ]  # fmt: skip
    assert [dataset.part(row).reason for row in (1, 2)] == ["", "changed"]


def test_packed_rows_concatenate_their_sequences(store):
    dataset = Sequences(store, np.array([5, 1, 0, 2]), np.array([0, 3, 4]))
    assert dataset.packed and len(dataset) == 2 and dataset.lengths.tolist() == [9, 3]
    first, second = dataset
    assert first["input_ids"].tolist() == [50, 51, 52, 53, 54, 55, 10, 11, 0]
    assert first["labels"].tolist() == [-100, 51, 52, 53, 54, 55, -100, 11, -100]
    assert first["seq_lengths"] == [6, 2, 1] and second["seq_lengths"] == [3]
    assert first["origins"].tolist() == [[1, 105], [1, 101], [0, 100]]
    assert dataset.origins(0) == [(1, 105), (1, 101), (0, 100)] and dataset.origins(1) == [(0, 102)]
    assert [row["input_ids"].tolist()[0] for row in dataset.unpacked()] == [0, 10, 20, 50]


def test_sample_draws_distinct_sequences_of_each_file(store):
    dataset = Sequences(store, np.array([5, 1, 0, 2, 3, 3, 6]), np.array([0, 3, 7]), ["a", "b"])
    sample = dataset.sample(2, seed=0)
    origins = [sample.origins(row)[0] for row in range(len(sample))]
    assert [file for file, _ in sorted(origins)] == [0, 0, 1, 1] and len(set(origins)) == 4
    assert not sample.packed and sample.files == ["a", "b"]
    assert origins == [dataset.sample(2, seed=0).origins(row)[0] for row in range(4)]
    assert len(dataset.sample(100, seed=0)) == 6


def test_pickled_copy_reads_the_same_rows(store):
    dataset = Sequences(store, np.array([2, 5]))
    assert dataset[1]["input_ids"].tolist()[-1] == 55
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000, "the pickled dataset should hold no tokens"
    assert pickle.loads(pickled)[1]["input_ids"].tolist() == dataset[1]["input_ids"].tolist()
