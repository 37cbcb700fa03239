"""Number of tokens in the largest micro-batch of a run, from the lengths of its rows and their order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel

from dft.ranks import data_parallel_size
from dft.training.attention.choice import runs_unpadded
from dft.training.batching import packing_obstacle, sequence_lengths
from dft.training.samplers import training_sampler

BatchTokens = Callable[[int], int]
"""Returns the number of tokens, padding included, in the largest micro-batch of a number of rows."""


def full_rows(length: int) -> BatchTokens:
    """Return the number of tokens of micro-batches whose rows all have the same length."""
    return lambda rows: rows * length


def largest_micro_batch(
    model: PreTrainedModel, training: transformers.TrainingArguments, dataset: Any, ranks: int
) -> BatchTokens:
    """Return the number of tokens of the largest micro-batch that the run would train on.

    The order of the data depends only on the seed and the epoch, so the micro-batches of all steps and ranks
    are known before training. Their number of rows may differ from that of the run, with as many rows per
    optimizer step.

    Args:
        model: the model, possibly on the meta device, with its attention implementation set.
        training: arguments of the run.
        dataset: the training data.
        ranks: number of ranks.
    """
    lengths = sequence_lengths(dataset)
    # Without padding a micro-batch has the tokens of its rows; otherwise all rows are as long as the longest.
    is_flat = runs_unpadded(model.config.get_text_config()) and packing_obstacle(model) is None
    groups = data_parallel_size(training, ranks)
    step_rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * groups

    def largest(rows: int) -> int:
        sampler = training_sampler(training, dataset, rows * groups, step_rows)
        steps_per_epoch = max(1, -(-len(sampler) // step_rows))
        total = training.max_steps if training.max_steps > 0 else training.num_train_epochs * steps_per_epoch
        steps, epoch, tokens = int(np.ceil(total)), 0, 0
        while steps > 0:
            sampler.set_epoch(epoch)
            ordered = lengths[sampler.order()[: steps * step_rows]]
            batches = np.append(ordered, np.ones(-len(ordered) % rows, ordered.dtype)).reshape(-1, rows)
            sizes = batches.sum(1) if is_flat else rows * batches.max(1)
            tokens = max(tokens, int(sizes.max(initial=0)))
            steps, epoch = steps - steps_per_epoch, epoch + 1
        return tokens

    return largest
