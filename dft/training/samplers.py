"""Choose the order in which the examples of a dataset are visited."""

import transformers
from torch.utils.data import Sampler

from dft.data.batches.sampler import EpochSampler, WithBlank
from dft.ranks import data_parallel_size, sequence_parallel_size
from dft.training.batching import sequence_lengths
from dft.training.parallel.sequence_parallel import RepeatedBatchSampler


def train_order(dataset: WithBlank, args: transformers.TrainingArguments) -> EpochSampler:
    """Return the sampler of the training data, whose order depends only on the seed and the epoch."""
    strategy = args.train_sampling_strategy
    seed = args.seed if args.data_seed is None else args.data_seed
    multiple = args.train_batch_size * data_parallel_size(args)
    return EpochSampler(
        len(dataset),
        multiple,
        seed=None if strategy == "sequential" else seed,
        drop_last=args.dataloader_drop_last,
        lengths=sequence_lengths(dataset.dataset) if strategy == "group_by_length" else None,
        group=multiple * args.gradient_accumulation_steps,
    )


def shared_order(order: EpochSampler, args: transformers.TrainingArguments) -> Sampler[int]:
    """Return the sampler that gives all ranks that share sequences the same batches."""
    ranks = sequence_parallel_size(args)
    return order if ranks == 1 else RepeatedBatchSampler(order, args.train_batch_size, ranks)


def eval_order(dataset: WithBlank, args: transformers.TrainingArguments) -> EpochSampler:
    """Return the sampler of evaluation data, which keeps their order."""
    return EpochSampler(len(dataset), args.eval_batch_size * args.world_size)
