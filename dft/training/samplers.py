"""Choose the order in which the examples of a dataset are visited."""

from typing import Any

import transformers
from torch.utils.data import Sampler

from dft.data.batches.sampler import EpochSampler, WithBlank
from dft.ranks import data_parallel_size, sequence_parallel_size
from dft.training.batching import sequence_lengths
from dft.training.parallel.sequence_parallel import RepeatedBatchSampler


def training_sampler(
    args: transformers.TrainingArguments, dataset: Any, multiple: int, step_rows: int
) -> EpochSampler:
    """Return the sampler of the training data, the same on all ranks.

    Args:
        args: the training arguments.
        dataset: the training data.
        multiple: number of rows that all ranks together consume per micro-batch.
        step_rows: number of rows per optimizer step.
    """
    by_length = args.train_sampling_strategy == "group_by_length"
    seed = args.seed if args.data_seed is None else args.data_seed
    return EpochSampler(
        len(dataset),
        multiple,
        seed=None if args.train_sampling_strategy == "sequential" else seed,
        drop_last=args.dataloader_drop_last,
        lengths=sequence_lengths(dataset) if by_length else None,
        group=step_rows,
    )


class DataOrder:
    """Order of training and evaluation data. Depends only on the seed and the epoch.

    Args:
        args: the training arguments.
    """

    def __init__(self, args: transformers.TrainingArguments) -> None:
        self._args = args
        self._train: EpochSampler | None = None

    def train_sampler(self, dataset: WithBlank) -> Sampler[int]:
        """Return the sampler of the training data."""
        args = self._args
        multiple = args.train_batch_size * data_parallel_size(args)
        step_rows = multiple * args.gradient_accumulation_steps
        self._train = training_sampler(args, dataset.dataset, multiple, step_rows)
        sharing = sequence_parallel_size(args)
        return (
            self._train if sharing == 1 else RepeatedBatchSampler(self._train, args.train_batch_size, sharing)
        )

    def eval_sampler(self, dataset: WithBlank) -> Sampler[int]:
        """Return the sampler of evaluation data, which keeps their order."""
        return EpochSampler(len(dataset), self._args.eval_batch_size * self._args.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the training data.

        accelerate does not forward the epoch to the sampler when a resumed run skips batches.
        """
        if self._train is not None:
            self._train.set_epoch(epoch)
