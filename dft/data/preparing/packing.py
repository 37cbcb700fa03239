"""Which sequences share a row: best-fit-decreasing bin packing."""

from collections.abc import Iterator

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts whole sequences into rows, so that few rows are needed and little of them stays empty.

    Best fit, decreasing: the longest first, each into the row with the least room that still holds it. Which
    of several equally long sequences goes where, and the order of the rows, are drawn by `seed`; rows in the
    order in which they were opened would go from full ones to leftovers.

    Args:
        lengths: (sequences,) tokens of each, integers.
        capacity: tokens that a row holds.
        seed: the same seed gives the same rows.

    Returns:
        order: (sequences,) int64, every number of a sequence once, row after row.
        offsets: (rows + 1,) int64; row r holds `order[offsets[r]:offsets[r + 1]]`.

    Raises:
        ValueError: a length below 1 or above `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise ValueError(
            f"sequence {wrong[0]} has {lengths[wrong[0]]} tokens; rows of {capacity} hold sequences of 1 to "
            f"{capacity}"
        )
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    items = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    opened, rows = _best_fit(lengths[items], capacity)
    row = generator.permutation(rows)[opened]  # (sequences,)
    order = items[np.argsort(row, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    return order.astype(np.int64), offsets.astype(np.int64)


def density(lengths: np.ndarray, rows: int, capacity: int) -> float:
    """The share of `rows` rows of `capacity` tokens that the sequences fill."""
    return float(lengths.sum() / (rows * capacity))


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(sequences,) the row of each, in the order in which rows are opened, and how many rows there are.

    All sequences of one length are placed together. After best fit puts one into a row, that same row is the
    fullest of those with room for another, so each row takes as many as it holds before the next is touched.
    """
    placed: list[int] = []
    rooms = _Rooms(capacity)
    opened = 0
    for length, count in _runs(lengths):
        while count:
            room = rooms.smallest(length)
            each = (capacity if room is None else room) // length
            wanted = -(-count // each)
            if room is None:
                room = capacity
                rows = list(range(opened, opened + wanted))
                opened += wanted
            else:
                rows = rooms.take(room, wanted)
            last = min(each, count - each * (len(rows) - 1))
            placed += [row for row in rows[:-1] for _ in range(each)] + [rows[-1]] * last
            rooms.put(room - each * length, rows[:-1])
            rooms.put(room - last * length, rows[-1:])
            count -= each * (len(rows) - 1) + last
    return np.array(placed, dtype=np.int64), opened


def _runs(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """(length, how many) of a sorted array."""
    starts = np.flatnonzero(np.diff(lengths, prepend=0))
    return zip(lengths[starts].tolist(), np.diff(starts, append=len(lengths)).tolist(), strict=True)


WORD = 512


class _Rooms:
    """Rows by the room left in them.

    Two layers of bits say which rooms have rows, so that the next larger one is found in constant time: with
    rows of 131,072 tokens nearly every sequence has a length of its own, and asks.
    """

    def __init__(self, capacity: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(capacity)]
        self.words = [0] * (capacity // WORD + 1)
        self.summary = 0

    def smallest(self, length: int) -> int | None:
        """The smallest room of at least `length` that a row has, if any does."""
        word = length // WORD
        bits = self.words[word] >> (length % WORD)
        if bits:
            return length + _lowest(bits)
        later = self.summary >> (word + 1)
        if not later:
            return None
        word += 1 + _lowest(later)
        return word * WORD + _lowest(self.words[word])

    def take(self, room: int, count: int) -> list[int]:
        """Up to `count` of the rows with this much room, at least one."""
        rows = self.rows[room]
        taken = rows[-count:]
        del rows[-count:]
        if not rows:
            self.words[room // WORD] ^= 1 << (room % WORD)
            if not self.words[room // WORD]:
                self.summary ^= 1 << (room // WORD)
        return taken

    def put(self, room: int, rows: list[int]) -> None:
        if room and rows:
            self.rows[room] += rows
            self.words[room // WORD] |= 1 << (room % WORD)
            self.summary |= 1 << (room // WORD)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
