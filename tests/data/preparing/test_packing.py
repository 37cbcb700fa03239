"""Packing compared with textbook best-fit-decreasing, and the density of its rows."""

import numpy as np
import pytest

from dft.data.preparing.packing import density, pack


def rows_of(lengths, capacity, seed=0):
    order, offsets = pack(lengths, capacity, seed)
    return [order[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def contents(rows):
    return sorted(tuple(sorted(row)) for row in rows)


def textbook_best_fit(lengths, capacity):
    """Return the lengths in each row, placing one sequence at a time."""
    rows = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def random_lengths(kind, capacity, generator):
    if kind == "uniform":
        return generator.integers(1, capacity + 1, 200)
    if kind == "short":
        return generator.integers(1, max(2, capacity // 8), 300)
    if kind == "few":
        return generator.choice(generator.integers(1, capacity + 1, 3), 250)
    return np.clip(generator.lognormal(np.log(capacity / 5), 0.8, 250), 1, capacity).astype(np.int64)


@pytest.mark.parametrize("kind", ["uniform", "short", "few", "lognormal"])
@pytest.mark.parametrize("capacity", [7, 64, 1000, 5000])
def test_rows_are_as_full_as_with_textbook_best_fit(kind, capacity):
    """Best fit may choose any of several equally full rows, but how full the rows become is determined."""
    generator = np.random.default_rng(capacity)
    for seed in range(5):
        lengths = random_lengths(kind, capacity, generator)
        rows = rows_of(lengths, capacity, seed)
        expected = sorted(sum(row) for row in textbook_best_fit(lengths, capacity))
        assert sorted(lengths[row].sum() for row in rows) == expected
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert max(lengths[row].sum() for row in rows) <= capacity


def test_order_and_offsets_are_int64_and_deterministic():
    lengths = np.random.default_rng(1).integers(1, 100, 500).astype(np.int32)
    order, offsets = pack(lengths, 128, seed=4)
    order_again, offsets_again = pack(lengths, 128, seed=4)
    assert order.dtype == offsets.dtype == np.int64
    assert order.tolist() == order_again.tolist() and offsets.tolist() == offsets_again.tolist()
    assert offsets[0] == 0 and offsets[-1] == 500 and (np.diff(offsets) > 0).all()


def test_seed_changes_the_contents_of_rows_but_not_their_number():
    lengths = np.full(400, 30)
    first, second = rows_of(lengths, 128, 1), rows_of(lengths, 128, 2)
    assert len(first) == len(second) == 100
    assert contents(first) != contents(second)
    assert np.mean([np.ptp(row) for row in first]) > 100  # neighbors in the file are not neighbors in a row


def test_rows_of_short_sequences_do_not_come_last():
    """In the order in which they were opened, the rows with the shortest sequences would come last."""
    lengths = np.concatenate([np.full(300, 100), np.full(300, 9)])
    counts = np.array([len(row) for row in rows_of(lengths, 100, 0)])
    small = np.flatnonzero(counts > 1)
    assert len(small) == 28 and small.min() < 100 and 130 < small.mean() < 200


@pytest.mark.parametrize(("bad", "message"), [(65, "sequence 2 has 65 tokens"), (0, "sequence 2 has 0")])
def test_lengths_that_fit_no_row_raise(bad, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array([3, 64, bad]), 64, seed=0)


def test_no_sequences_give_no_rows():
    order, offsets = pack(np.zeros(0, dtype=np.int64), 64, seed=0)
    assert order.tolist() == [] and offsets.tolist() == [0]


def test_chat_like_lengths_fill_the_rows_to_98_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.5, 20_000), 20, 2048).astype(np.int64)
    rows = len(rows_of(lengths, 2048))
    assert density(lengths, rows, 2048) == lengths.sum() / (rows * 2048) > 0.98
