"""Compares p of each token before and after training."""

from dataclasses import dataclass

import numpy as np

from dft.data.batches.dataset import Sequences
from dft.training.base_scores.scorer import SequenceScorer, score_on_ranks


@dataclass(frozen=True)
class Comparison:
    """The tokens of some sequences with their probabilities before and after training.

    Attributes:
        sequences: the sequences, one per row.
        row: (targets,) int64, the row of each token.
        place: (targets,) int64, its index in the sequence.
        before, after: (targets,) float64, its probability.
    """

    sequences: Sequences
    row: np.ndarray
    place: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def largest_changes(self, count: int, sign: int) -> np.ndarray:
        """Return the indices of the tokens whose p rose (sign 1) or fell (-1) most, at most `count`."""
        change = sign * (self.after - self.before)
        order = np.argsort(-change, kind="stable")[:count]
        return order[change[order] > 0]


def compare(scorer: SequenceScorer, sequences: Sequences) -> Comparison:
    """Score sequences again, and compare with their base scores. All ranks must call it.

    Args:
        scorer: scores the sequences with the trained model.
        sequences: distinct sequences with base scores, one per row, in the order of their file.
    """
    counts = sequences.target_counts()
    after = score_on_ranks(scorer, np.arange(len(sequences)), counts)
    places, before = [], []
    for row in sequences:
        mask = ~np.isnan(row["base_logp"])  # also what a filter removed from the labels
        places.append(np.flatnonzero(mask))
        before.append(row["base_logp"][mask])
    empty = [np.zeros(0)]
    return Comparison(
        sequences,
        np.repeat(np.arange(len(sequences)), counts),
        np.concatenate(places or empty).astype(np.int64),
        np.exp(np.concatenate(before or empty).astype(np.float64)),
        np.exp(after.astype(np.float64)),
    )
