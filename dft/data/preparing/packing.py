"""Best-fit-decreasing bin packing of sequences into rows."""

from collections.abc import Iterator

import numpy as np

WORD_BITS = 512
"""Bits per integer of the lower level of `_RowsByRoom`."""


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack whole sequences into as few rows as best-fit-decreasing finds.

    The longest sequences are placed first, each into the row with the least room that still holds it. The
    placement of equally long sequences and the order of the rows are random, because in the order in which
    they were opened, full rows would come first and rows of many short leftovers last.

    Args:
        lengths: (sequences,) integers, tokens of each sequence.
        capacity: number of tokens that a row holds.
        seed: seed of the random choices.

    Returns:
        order: (sequences,) int64, the index of every sequence once, row after row.
        offsets: (rows + 1,) int64; row r holds `order[offsets[r]:offsets[r + 1]]`.

    Raises:
        ValueError: a length is below 1 or above `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    invalid = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if invalid.size:
        raise ValueError(
            f"sequence {invalid[0]} has {lengths[invalid[0]]} tokens; rows of {capacity} hold sequences of 1 "
            f"to {capacity}"
        )
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    items = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row_in_opening_order, rows = _best_fit(lengths[items], capacity)
    row = generator.permutation(rows)[row_in_opening_order]  # (sequences,)
    order = items[np.argsort(row, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    return order.astype(np.int64), offsets.astype(np.int64)


def density(lengths: np.ndarray, rows: int, capacity: int) -> float:
    """Return the share of all row capacity that the sequences fill, from 0 to 1."""
    return float(lengths.sum() / (rows * capacity))


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign sequences, sorted by decreasing length, to rows numbered in the order in which they are opened.

    All sequences of one length are placed together. After best fit puts a sequence into a row, that row is
    the fullest of those with room for another one of the same length, so each row takes as many as it holds
    before the next row is used.

    Returns:
        The row of each sequence, (sequences,) int64, and the number of rows.
    """
    placed: list[int] = []
    open_rows = _RowsByRoom(capacity)
    opened = 0
    for length, count in _runs(lengths):
        while count:
            room = open_rows.smallest_room(length)
            per_row = (capacity if room is None else room) // length
            needed = -(-count // per_row)
            if room is None:
                room = capacity
                rows = list(range(opened, opened + needed))
                opened += needed
            else:
                rows = open_rows.take(room, needed)
            last = min(per_row, count - per_row * (len(rows) - 1))
            placed += [row for row in rows[:-1] for _ in range(per_row)] + [rows[-1]] * last
            open_rows.put(room - per_row * length, rows[:-1])
            open_rows.put(room - last * length, rows[-1:])
            count -= per_row * (len(rows) - 1) + last
    return np.array(placed, dtype=np.int64), opened


def _runs(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Iterate over the distinct values of a sorted array and their counts."""
    starts = np.flatnonzero(np.diff(lengths, prepend=0))
    return zip(lengths[starts].tolist(), np.diff(starts, append=len(lengths)).tolist(), strict=True)


class _RowsByRoom:
    """Open rows by the room left in them, in tokens.

    Two levels of bit sets record which amounts of room occur, so that the next larger one is found in
    constant time. This matters for long rows: with rows of 131,072 tokens nearly every sequence has a
    different length and needs a separate lookup.

    Args:
        capacity: number of tokens that an empty row holds.
    """

    def __init__(self, capacity: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(capacity)]
        self.words = [0] * (capacity // WORD_BITS + 1)
        self.summary = 0

    def smallest_room(self, length: int) -> int | None:
        """Return the smallest room of an open row that fits `length` tokens, or None if no row does."""
        word = length // WORD_BITS
        bits = self.words[word] >> (length % WORD_BITS)
        if bits:
            return length + _lowest_bit(bits)
        later = self.summary >> (word + 1)
        if not later:
            return None
        word += 1 + _lowest_bit(later)
        return word * WORD_BITS + _lowest_bit(self.words[word])

    def take(self, room: int, count: int) -> list[int]:
        """Remove and return up to `count`, but at least one, of the rows with exactly this room."""
        rows = self.rows[room]
        taken = rows[-count:]
        del rows[-count:]
        if not rows:
            self.words[room // WORD_BITS] ^= 1 << (room % WORD_BITS)
            if not self.words[room // WORD_BITS]:
                self.summary ^= 1 << (room // WORD_BITS)
        return taken

    def put(self, room: int, rows: list[int]) -> None:
        """Add rows with this room; full rows are dropped."""
        if room and rows:
            self.rows[room] += rows
            self.words[room // WORD_BITS] |= 1 << (room % WORD_BITS)
            self.summary |= 1 << (room // WORD_BITS)


def _lowest_bit(bits: int) -> int:
    """Return the index of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
