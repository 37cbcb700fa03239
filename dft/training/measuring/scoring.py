"""Per-token scores of a dataset: a table of all supervised tokens, or a few whole conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from dft.loss.dft import TokenStats

EXAMPLES = 4
"""Number of conversations of an evaluation that are kept token by token."""
EXAMPLE_TOKENS = 400
"""Maximum number of tokens kept of each example. The last ones are kept, since the answer is at the end."""


@dataclass(frozen=True)
class TokenTable:
    """Scores of the supervised tokens of a dataset, one row per token.

    Attributes:
        nll: (tokens,) float64, negative log-likelihood in nats.
        entropy: (tokens,) float64, entropy of the model's distribution in nats.
        correct: (tokens,) bool, whether the target is the argmax.
        target: (tokens,) int64, the token to predict.
        file, line: (tokens,) int64, location of its conversation; -1 if unknown.
        weights: (tokens, objectives) float64, the weight of the token under each of some objectives, times
            that of the data; None if they were not asked for.
    """

    nll: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    target: np.ndarray
    file: np.ndarray
    line: np.ndarray
    weights: np.ndarray | None = None

    @property
    def p_correct(self) -> np.ndarray:
        """(tokens,) float64, probability of the target."""
        return np.exp(-self.nll)

    def __len__(self) -> int:
        return len(self.nll)

    def select(self, rows: np.ndarray) -> "TokenTable":
        """Return the rows that an index array or a mask selects."""
        columns = (vars(self)[column.name] for column in fields(self))
        selected: list[Any] = [None if column is None else column[rows] for column in columns]
        return TokenTable(*selected)

    @classmethod
    def from_batch(
        cls, stats: TokenStats, inputs: Mapping[str, Any], weights: Tensor | None = None
    ) -> "TokenTable":
        """Return the table of one batch.

        Args:
            weights: (tokens, objectives) weights of objectives, without those of the data.
        """
        if weights is not None:
            assert len(weights) == len(stats.nll)
            if stats.loss_weight is not None:
                weights = weights * stats.loss_weight.to(weights)[:, None]
        file, line = origins_of_tokens(inputs).T.cpu().numpy()
        return cls(
            stats.nll.cpu().double().numpy(),
            stats.entropy.cpu().double().numpy(),
            stats.correct.cpu().numpy(),
            stats.target.cpu().numpy(),
            file,
            line,
            None if weights is None else weights.cpu().double().numpy(),
        )

    @classmethod
    def concatenate(cls, tables: Sequence["TokenTable"]) -> "TokenTable":
        """Return the rows of all tables in one."""
        columns = [[vars(table)[column.name] for table in tables] for column in fields(cls)]
        joined: list[Any] = [None if parts[0] is None else np.concatenate(parts) for parts in columns]
        return cls(*joined)

    @classmethod
    def gather(cls, tables: Sequence["TokenTable"]) -> "TokenTable":
        """Return the rows of the tables of all ranks, ordered by file and line. This is a collective."""
        table = cls.concatenate(gather_object(list(tables)))
        return table.select(np.lexsort((table.line, table.file)))


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence with the probability of each supervised token.

    Attributes:
        file, line: location of its conversation; -1 if unknown.
        ids: token ids.
        p_correct: probability of each token; None for tokens that are not supervised.
        shortened: whether earlier tokens were dropped.
    """

    file: int
    line: int
    ids: list[int]
    p_correct: list[float | None]
    shortened: bool


def scored_sequences(stats: TokenStats, inputs: Mapping[str, Any], limit: int) -> list[ScoredSequence]:
    """Return the first sequences of a batch that have a supervised token, at most `limit`."""
    ids = inputs["input_ids"].flatten().cpu()
    sequence_ids = inputs["sequence_ids"].flatten().cpu()
    targets = inputs["loss_positions"].cpu() + 1
    p_correct = torch.zeros(ids.shape, dtype=torch.float64)
    p_correct[targets] = stats.p_correct.cpu().double()
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    supervised[targets] = True
    sequences: list[ScoredSequence] = []
    for number in range(int(sequence_ids.max()) + 1):
        members = sequence_ids == number
        if len(sequences) == limit or not supervised[members].any():
            continue
        tokens = ids[members].tolist()
        pairs = zip(p_correct[members].tolist(), supervised[members].tolist(), strict=True)
        scores = [p if is_supervised else None for p, is_supervised in pairs]
        file, line = inputs["origins"][number].tolist() if "origins" in inputs else (-1, -1)
        start = max(0, len(tokens) - EXAMPLE_TOKENS)
        sequences.append(ScoredSequence(file, line, tokens[start:], scores[start:], start > 0))
    return sequences


def origins_of_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Return the file and line of each supervised token, (tokens, 2) int64; -1 if unknown."""
    numbers = inputs["sequence_ids"].flatten()[inputs["loss_positions"]]
    return inputs["origins"][numbers] if "origins" in inputs else numbers.new_full((len(numbers), 2), -1)
