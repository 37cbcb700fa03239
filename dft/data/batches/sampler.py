"""Sampler that visits every example exactly once per epoch on any number of ranks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from dft.labels import IGNORE_INDEX

BLANK = -1
"""Index of the blank example, which consists of one unsupervised token."""
SORTED_STEPS = 50
"""Optimizer steps that are sorted by length together: enough to save padding, few enough to stay shuffled."""


class EpochSampler(Sampler[int]):
    """Sampler of every example once per epoch, followed by blanks that complete the last batch of each rank.

    Other distributed samplers fill the last batch with examples from the beginning, which then count twice in
    the gradient and the metrics, depending on the number of ranks. The order depends only on the seed and the
    epoch, so a resumed run finds its position without replaying random numbers.

    Args:
        size: number of examples in the dataset.
        multiple: examples that all ranks together consume per batch (batch size * ranks).
        seed: seed of the shuffling; None keeps the order of the dataset.
        drop_last: drop the examples that do not fill a full multiple instead of adding blanks.
        lengths: (size,) tokens of each example, to batch examples of similar length; None to ignore lengths.
        group: number of examples per optimizer step. Steps of similar lengths are formed, then shuffled.
    """

    def __init__(
        self,
        size: int,
        multiple: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        lengths: np.ndarray | None = None,
        group: int = 1,
    ) -> None:
        self.size = size
        self.multiple = multiple
        self.seed = seed
        self.drop_last = drop_last
        self.lengths = lengths
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order if there is a seed."""
        self.epoch = epoch

    def __len__(self) -> int:
        remainder = self.size % self.multiple
        if self.drop_last:
            return self.size - remainder
        return self.size + (-remainder % self.multiple)

    def __iter__(self) -> Iterator[int]:
        yield from self.order().tolist()
        yield from [BLANK] * (len(self) - self.size)

    def order(self) -> np.ndarray:
        """Return the examples of the epoch in order, without blanks."""
        order = np.arange(self.size)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        if self.lengths is not None:
            order = self._group_by_length(order, self.lengths)
        return order[: len(self)]

    def _group_by_length(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Sort each run of `SORTED_STEPS` optimizer steps by length, then shuffle the steps."""
        generator = np.random.default_rng([self.seed or 0, self.epoch, 1])
        span = self.group * SORTED_STEPS
        stretches = [order[start : start + span] for start in range(0, self.size, span)]
        ordered = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in stretches])
        full = self.size - self.size % self.group
        steps = generator.permutation(ordered[:full].reshape(-1, self.group))
        return np.concatenate([steps.reshape(-1), ordered[full:]])


class WithBlank(Dataset):
    """Dataset wrapper that returns a single unsupervised token for the index `BLANK`.

    Args:
        dataset: the wrapped dataset, which handles all other indices.
        token_id: the token of the blank example.
    """

    def __init__(self, dataset: Sequence[Mapping[str, Any]], token_id: int) -> None:
        self.dataset = dataset
        self.blank: dict[str, list[float]] = {"input_ids": [token_id], "labels": [IGNORE_INDEX]}
        # The batch of a rank may consist of blanks, and some objectives need the column in every batch.
        if len(dataset) and "base_logp" in dataset[0]:
            self.blank["base_logp"] = [math.nan]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.blank if index == BLANK else self.dataset[index]
