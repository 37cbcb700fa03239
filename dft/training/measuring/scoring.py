"""What a model says about single tokens, kept for a reader: whole tables, or a few conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from dft.loss.dft import TokenStats

EXAMPLES = 4
"""Conversations of an evaluation that are kept token by token."""
EXAMPLE_TOKENS = 400
"""Of each of them at most, the last ones: the answer ends there."""


@dataclass(frozen=True)
class TokenTable:
    """Supervised tokens of a dataset under a model, each a row.

    Attributes:
        nll: (tokens,) float64, in nats.
        entropy: (tokens,) float64, of the model's distribution, in nats.
        correct: (tokens,) bool, whether the target is the argmax.
        target: (tokens,) int64, the token to predict.
        file, line: (tokens,) int64, where its conversation is; -1 where that is not known.
    """

    nll: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    target: np.ndarray
    file: np.ndarray
    line: np.ndarray

    @property
    def p_correct(self) -> np.ndarray:
        """(tokens,) float64, the probability of the target."""
        return np.exp(-self.nll)

    def __len__(self) -> int:
        return len(self.nll)

    def select(self, rows: np.ndarray) -> "TokenTable":
        """Some of the rows, chosen by index or by a mask."""
        return TokenTable(*(vars(self)[column.name][rows] for column in fields(self)))

    @classmethod
    def from_batch(cls, stats: TokenStats, inputs: Mapping[str, Any]) -> "TokenTable":
        file, line = origins_of_tokens(inputs).T.cpu().numpy()
        return cls(
            stats.nll.double().cpu().numpy(),
            stats.entropy.double().cpu().numpy(),
            stats.correct.cpu().numpy(),
            stats.target.cpu().numpy(),
            file,
            line,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["TokenTable"]) -> "TokenTable":
        return cls(*(np.concatenate([vars(part)[column.name] for part in parts]) for column in fields(cls)))

    @classmethod
    def gather(cls, parts: Sequence["TokenTable"]) -> "TokenTable":
        """Tables of this and all other ranks as one, in the order of files and lines. A collective."""
        whole = cls.concatenate(gather_object(list(parts)))
        return whole.select(np.lexsort((whole.line, whole.file)))


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence as the model sees it.

    Attributes:
        file, line: where its conversation is; -1 where that is not known.
        ids: its tokens.
        p_correct: of each token, None where it is not supervised.
        shortened: whether tokens in front of these were left out.
    """

    file: int
    line: int
    ids: list[int]
    p_correct: list[float | None]
    shortened: bool


def scored_sequences(stats: TokenStats, inputs: Mapping[str, Any], limit: int) -> list[ScoredSequence]:
    """The first sequences of a batch that have a supervised token, at most `limit`."""
    ids = inputs["input_ids"].flatten().cpu()
    of_sequence = inputs["sequence_ids"].flatten().cpu()
    where = inputs["loss_positions"].cpu() + 1
    p_correct = torch.zeros(ids.shape, dtype=torch.float64)
    p_correct[where] = stats.p_correct.double().cpu()
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    supervised[where] = True
    found = []
    for number in range(int(of_sequence.max()) + 1):
        member = of_sequence == number
        if len(found) == limit or not supervised[member].any():
            continue
        tokens, taught = ids[member].tolist(), supervised[member].tolist()
        values = p_correct[member].tolist()
        shown = [value if one else None for value, one in zip(values, taught, strict=True)]
        file, line = inputs["origins"][number].tolist() if "origins" in inputs else (-1, -1)
        cut = max(0, len(tokens) - EXAMPLE_TOKENS)
        found.append(ScoredSequence(file, line, tokens[cut:], shown[cut:], cut > 0))
    return found


def origins_of_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """(tokens, 2) int64, file and line of each supervised token; -1 where they are not known."""
    of_tokens = inputs["sequence_ids"].flatten()[inputs["loss_positions"]]
    return (
        inputs["origins"][of_tokens] if "origins" in inputs else of_tokens.new_full((len(of_tokens), 2), -1)
    )
