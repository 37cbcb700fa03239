"""In which order the examples of an epoch come, and what fills the last batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from dft.labels import IGNORE_INDEX

BLANK = -1
"""The index of an example that nothing is learned from."""
MEGA_BATCHES = 50
"""Optimizer steps sorted by length together: enough to save padding, few enough to stay mixed."""


class EpochSampler(Sampler[int]):
    """Every example exactly once per epoch, then blanks up to a whole number of batches on every rank.

    Other samplers fill up with examples from the beginning, which would then count twice in a metric and in a
    gradient, on some world sizes and not on others. The order depends on the seed and the epoch alone, so a
    resumed run finds its place without replaying random numbers.

    Args:
        size: examples in the dataset.
        multiple: examples that all ranks together take at a time (batch size * ranks).
        seed: of the shuffling; None keeps the order of the dataset.
        drop_last: leave out the examples that do not fill a whole multiple, in place of adding blanks.
        lengths: (size,) tokens of each example, to batch examples of similar length; None mixes all lengths.
        group: examples per optimizer step, the unit in which `lengths` groups.
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
        self.epoch = epoch

    def __len__(self) -> int:
        rest = self.size % self.multiple
        if self.drop_last:
            return self.size - rest
        return self.size + (-rest % self.multiple)

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.size)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        if self.lengths is not None:
            order = self._grouped_by_length(order)
        yield from order[: len(self)].tolist()
        yield from [BLANK] * (len(self) - self.size)

    def _grouped_by_length(self, order: np.ndarray) -> np.ndarray:
        """Sorts within large groups of a shuffled order, then shuffles the optimizer steps again."""
        generator = np.random.default_rng([self.seed or 0, self.epoch, 1])
        span = self.group * MEGA_BATCHES
        chunks = [order[start : start + span] for start in range(0, self.size, span)]
        ordered = np.concatenate([one[np.argsort(-self.lengths[one], kind="stable")] for one in chunks])
        whole = self.size - self.size % self.group
        steps = generator.permutation(ordered[:whole].reshape(-1, self.group))
        return np.concatenate([steps.reshape(-1), ordered[whole:]])


class WithBlank(Dataset):
    """A dataset that answers the index `BLANK` with one unsupervised token, and any other as before."""

    def __init__(self, dataset: Sequence[Mapping[str, Any]], token_id: int) -> None:
        self.dataset = dataset
        self.blank = {"input_ids": [token_id], "labels": [IGNORE_INDEX]}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.blank if index == BLANK else self.dataset[index]
