"""Plan the pass of `--base_scores` over the data before training: its operations, memory and storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from dft.data.batches.dataset import Sequences
from dft.loss.tiles import tile_limit
from dft.training.base_scores.store import BYTES_PER_TARGET
from dft.training.measuring.throughput import ModelFlops, model_flops
from dft.training.memory.estimate import (
    MemoryLayout,
    autocasts,
    bytes_per_frozen_element,
    estimate_activations,
    estimate_logits,
    product_dtype,
)
from dft.training.parameters import GIB, element_count


@dataclass(frozen=True)
class ScoringPlan:
    """Operations, memory and storage of scoring the data, if no scores are stored yet.

    Attributes:
        tokens: tokens of the training and evaluation data, each sequence once.
        evaluation_tokens: those of the evaluation data among them.
        operations: floating-point operations over all ranks; None if the number of active experts is unknown.
        epoch_share: `operations` divided by those of an epoch of training; None if unknown.
        peak: memory of a device in GiB.
        stored: bytes of the scores.
    """

    tokens: int
    evaluation_tokens: int
    operations: float | None
    epoch_share: float | None
    peak: float
    stored: int


def plan_scoring(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    layout: MemoryLayout,
    datasets: Mapping[str, Sequences],
    report: Mapping[str, Any],
    longest: int,
    fused: bool,
) -> ScoringPlan:
    """Plan scoring the data.

    Args:
        model: the model, possibly on the meta device.
        training: arguments of the run.
        layout: distribution over the devices.
        datasets: the prepared data by name.
        report: `PreparedData.report`, which has the supervised tokens.
        longest: number of tokens of the longest row of training or evaluation.
        fused: whether the fused head computes the scores.
    """
    lengths = {split: Sequences(data.path, data.distinct).lengths for split, data in datasets.items()}
    shares = {split: report[split]["supervised_tokens"] / report[split]["tokens"] for split in datasets}
    counts = {split: int(of.sum()) for split, of in lengths.items()}
    supervised = sum(counts[split] * shares[split] for split in counts)
    total = sum(counts.values())
    tokens = min(total, training.per_device_eval_batch_size * longest)
    share = max(shares.values())
    operations, epoch_share = None, None
    forward, step = model_flops(model, forward_only=True), model_flops(model)
    if forward is not None and step is not None:
        operations = sum(_operations(forward, lengths[split], shares[split]) for split in counts)
        trained = datasets["train"].unpacked().lengths  # a sequence may occur several times
        epoch = _operations(step, trained, shares["train"])
        if training.gradient_checkpointing:  # all but the head runs forward again
            epoch += _operations(forward, trained, 0.0)
        epoch_share = operations / epoch
    peak = _peak(model, training, layout, tokens, tokens * share if fused else None)
    stored = BYTES_PER_TARGET * round(supervised)
    return ScoringPlan(total, total - counts["train"], operations, epoch_share, peak, stored)


def _operations(flops: ModelFlops, lengths: np.ndarray, supervised_share: float) -> float:
    tokens = float(lengths.sum())
    pairs = float((lengths * (lengths + 1)).sum()) / 2
    return flops.total(tokens, pairs, tokens * supervised_share)


def _peak(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    layout: MemoryLayout,
    tokens: int,
    supervised: float | None,
) -> float:
    """Return the memory of a device while a batch is scored, in GiB.

    The model is not yet wrapped: only ZeRO-3 shards it. Counts the weights, one layer and the logits.

    Args:
        tokens: tokens of the largest batch.
        supervised: those that the fused head scores; None without the fused head.
    """
    is_sharded = layout.stage == 3
    weights = 0.0
    if not layout.weights_offloaded:
        for parameter in model.parameters():
            is_packed = is_sharded or parameter.dtype == torch.uint8
            size = bytes_per_frozen_element(parameter, layout) if is_packed else parameter.element_size()
            weights += element_count(parameter) * size / (layout.ranks if is_sharded else 1)
    if autocasts(model, training, layout):  # autocast caches the weights that it has cast
        weights += 2 * sum(element_count(parameter) for parameter in model.parameters())
    rows = training.per_device_eval_batch_size
    layers = model.config.get_text_config().num_hidden_layers
    layer = estimate_activations(model, training, rows, tokens, False, layout) / layers
    if supervised is None:
        logits = estimate_logits(model, training, tokens) / 2  # no gradient
    else:
        wide = 4 * supervised * model.config.get_text_config().vocab_size
        logits = min(wide, tile_limit(product_dtype(model, training, layout), layout.device)) / GIB
    return weights / GIB + layer + logits
