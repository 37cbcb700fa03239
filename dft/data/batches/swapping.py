"""Answers under the questions of other conversations, to measure what is learned from wrong ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dft.labels import IGNORE_INDEX

MAX_PARTNERS = 8
"""Number of other conversations that are tried as the source of another question."""


class SwappedAnswers(Dataset):
    """Pairs of sequences with the same answer: row 2 i under its own question, row 2 i + 1 under another one.

    A question is all that comes before the first supervised token, and the answer the supervised tokens that
    follow it without interruption. The other question is from a random sequence of the same file. Answers
    that would fit it (equal questions or equal answers) are not paired, nor are those that would make a
    sequence longer than the longest of the dataset.

    Rows hold `input_ids`, `labels`, `loss_weights` where the dataset has them, and `origins`: the pair's
    number as the file, and 0 or 1 as the line.

    Args:
        dataset: rows of one sequence each, as of `Sequences`.
        limit: maximum number of pairs.
        seed: determines which sequences are paired.
    """

    def __init__(self, dataset: Sequence[Mapping[str, Any]], limit: int, seed: int) -> None:
        self.rows: list[dict[str, Any]] = []
        order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
        by_file: dict[int, list[Mapping[str, Any]]] = {}
        for index in order:
            row = dataset[index]
            by_file.setdefault(int(np.array(row["origins"])[0][0]), []).append(row)
        longest = max((len(row["input_ids"]) for rows in by_file.values() for row in rows), default=0)
        # Turns of the files alternate, so that a limit applies to each of them.
        pairs = [_pairs(rows, longest) for rows in by_file.values()]
        while pairs and len(self) < 2 * limit:
            pairs = [iterator for iterator in pairs if self._append(next(iterator, None), limit)]

    def _append(self, pair: list[dict[str, Any]] | None, limit: int) -> bool:
        """Append a pair. Return whether there was one."""
        if pair is None or len(self) >= 2 * limit:
            return False
        number = len(self) // 2
        self.rows += [{**row, "origins": [(number, kind)]} for kind, row in enumerate(pair)]
        return True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _pairs(rows: Sequence[Mapping[str, Any]], longest: int) -> Iterator[list[dict[str, Any]]]:
    """Yield each answer under its own and under another question."""
    parts = [part for row in rows if (part := _parts(row)) is not None]
    for index, (question, answer, weights) in enumerate(parts):
        for distance in range(1, min(MAX_PARTNERS + 1, len(parts))):
            other, other_answer, _ = parts[(index + distance) % len(parts)]
            differs = not np.array_equal(question, other) and not np.array_equal(answer, other_answer)
            if differs and len(other) + len(answer) <= longest:
                yield [_joined(asked, answer, weights) for asked in (question, other)]
                break


def _parts(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Return the first question of a row, its answer and the weights of that; None without a question."""
    ids, supervised = np.array(row["input_ids"]), np.array(row["labels"]) != IGNORE_INDEX
    if not supervised[1:].any() or supervised[0]:
        return None
    start = int(supervised.argmax())
    length = int((~supervised[start:]).argmax()) or len(ids) - start
    weights = np.array(row["loss_weights"])[start : start + length] if "loss_weights" in row else None
    return ids[:start], ids[start : start + length], weights


def _joined(question: np.ndarray, answer: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    """Return a row of a question and a supervised answer."""
    ids = np.concatenate([question, answer])
    labels = np.concatenate([np.full(len(question), IGNORE_INDEX), answer])
    row = {"input_ids": ids, "labels": labels}
    if weights is not None:
        row["loss_weights"] = np.concatenate([np.ones(len(question)), weights])
    return row
