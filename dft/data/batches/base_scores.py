"""Log-probabilities of the supervised tokens under the model before training, stored beside the data.

They belong to the sequences of an Arrow file, not to rows, so they stay valid for any packing, order, batch
and number of ranks. One float32 is stored per supervised token, half of what the token's id and label take.
float16 would round log p = -10 by up to 0.004, an error of 0.4 % in a ratio of probabilities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dft.labels import IGNORE_INDEX


def target_mask(labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return which tokens of a sequence enter the loss, (tokens,) bool.

    Args:
        labels: (tokens,) labels of the sequence. Its first token is never a target.
        weights: (tokens,) weights in the data, or None. Tokens of weight 0 are not supervised.
    """
    mask = labels != IGNORE_INDEX
    mask[:1] = False
    return mask if weights is None else mask & (weights != 0)


@dataclass(frozen=True)
class BaseScores:
    """Scores of the sequences of an Arrow file.

    Attributes:
        path: file with one float32 per target, sequence after sequence.
        indices: (sequences,) int64, ascending: the sequences in the Arrow file that have scores.
        offsets: (sequences + 1,) int64: the scores of `indices[i]` are those from `offsets[i]` to
            `offsets[i + 1]`.
        key: digest of the model, its settings and the data.
    """

    path: Path
    indices: np.ndarray
    offsets: np.ndarray
    key: str

    @cached_property
    def values(self) -> np.ndarray:
        """The scores of all targets, (targets,) float32, in a memory-mapped file."""
        count = int(self.offsets[-1])
        return (
            np.memmap(self.path, np.float32, "r", shape=(count,)) if count else np.zeros(0, dtype=np.float32)
        )

    def of_sequence(self, index: int) -> np.ndarray:
        """Return the scores of the targets of a sequence, (targets,) float32.

        Raises:
            IndexError: the sequence has no scores.
        """
        position = int(np.searchsorted(self.indices, index))
        if position == len(self.indices) or self.indices[position] != index:
            raise IndexError(f"sequence {index} has no base scores")
        return self.values[self.offsets[position] : self.offsets[position + 1]]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy maps the file again, instead of carrying the values.
        return {name: value for name, value in vars(self).items() if name != "values"}


@dataclass(frozen=True)
class BaseFilter:
    """Selects the targets whose probability under the model before training is not too low.

    Attributes:
        min_p: smallest probability that is kept.
        exempt_ids: tokens that are kept whatever their probability: those that end a turn. A model that was
            never trained on the chat template considers them very unlikely, and would not learn to stop.
    """

    min_p: float
    exempt_ids: tuple[int, ...] = ()

    def keeps(self, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return which targets are kept, (targets,) bool.

        Args:
            scores: (targets,) log-probabilities.
            targets: (targets,) token ids.
        """
        return (scores >= math.log(self.min_p)) | np.isin(targets, self.exempt_ids)


@dataclass(frozen=True)
class FilterCounts:
    """What a `BaseFilter` removes from a dataset. Sequences that occur several times count each time.

    Attributes:
        tokens: (files,) supervised tokens of each data file before.
        dropped: (files,) supervised tokens of each data file that are no longer supervised.
        exempt: end-of-turn tokens below the bound, which stay.
        sequences: sequences before.
        emptied: sequences that have no supervised token left.
    """

    tokens: np.ndarray
    dropped: np.ndarray
    exempt: int
    sequences: int
    emptied: int

    def describe(self, min_p: float, names: Sequence[str]) -> dict[str, Any]:
        """Return the counts for the data report.

        Args:
            min_p: the bound.
            names: names of the data files.
        """
        return {
            "min_base_p": min_p,
            "supervised_tokens": int(self.tokens.sum()),
            "dropped_tokens": int(self.dropped.sum()),
            "exempt_end_of_turn_tokens": self.exempt,
            "sequences": self.sequences,
            "dropped_sequences": self.emptied,
            "files": [
                {"file": name, "supervised_tokens": int(total), "dropped_tokens": int(dropped)}
                for name, total, dropped in zip(names, self.tokens, self.dropped, strict=True)
            ],
        }
