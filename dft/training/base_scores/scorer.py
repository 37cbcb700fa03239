"""Scores sequences with a model: the log-probability of each supervised token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dft.data.batches.base_scores import target_mask
from dft.data.batches.dataset import Sequences
from dft.loss.objectives import Sft
from dft.training.batching import choose_collator, padding_id
from dft.training.parameters import compute_dtype
from dft.training.step_loss import StepLoss, evaluating

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by the value of transformers' `mixed_precision`."""
Scored = tuple[np.ndarray, np.ndarray]
"""Positions of sequences, (sequences,) int64, and the scores of their targets, concatenated, float32."""


class SequenceScorer:
    """Computes log-probabilities in batches of similar lengths, with the fused head where that is exact.

    The sequences of a batch are scored one by one, not packed, so scores do not depend on how training packs
    them. Under ZeRO-3, all ranks must make the same calls.

    Args:
        model: the model.
        forward: the model, possibly wrapped for training.
        training: training arguments; batches have at most as many tokens as those of an evaluation.
        dataset: the data to score.
        fused_head: see `DFTTrainer`.
        longest: number of tokens of the longest row of training or evaluation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Any,
        training: transformers.TrainingArguments,
        dataset: Sequences,
        fused_head: str,
        longest: int,
    ) -> None:
        self._model, self._forward, self._training = model, forward, training
        self._sequences = Sequences(dataset.path, dataset.distinct, files=dataset.files)
        self._lengths = self._sequences.lengths
        self._collator = choose_collator(model, padding_id(model), packed=False)
        self._max_tokens = training.per_device_eval_batch_size * longest
        self._loss = StepLoss(
            model,
            training.device,
            compute_dtype(training, model),
            lambda: self._collator,
            fused_head=fused_head,
            unwrap=lambda _: model,
            announces=False,  # the trainer's own does
        )
        self._is_inspected = False

    def batches(self, positions: np.ndarray) -> list[np.ndarray]:
        """Return the positions in batches, the longest sequences first.

        Args:
            positions: (sequences,) positions among the distinct sequences of the dataset.
        """
        ordered = positions[np.argsort(-self._lengths[positions], kind="stable")]
        batches, start = [], 0
        while start < len(ordered):
            count = max(1, self._max_tokens // int(self._lengths[ordered[start]]))
            batches.append(ordered[start : start + count])
            start += count
        return batches

    def score(self, positions: np.ndarray) -> Scored:
        """Return the scores of a batch of sequences."""
        if not self._is_inspected:
            self._loss.inspect_model(self._model, self._forward)
            self._is_inspected = True
        examples = [self._sequences[int(position)] for position in positions]
        batch = self._collator(examples)
        inputs = {
            name: value.to(self._training.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        with torch.no_grad(), evaluating(self._forward), self._autocast():
            _, stats, _ = self._loss.score(self._forward, inputs, Sft())
        counts = [int(target_mask(row["labels"], row.get("loss_weights")).sum()) for row in examples]
        assert sum(counts) == len(stats.nll), "every target has a score"
        return positions, -stats.nll.float().cpu().numpy()

    def _autocast(self) -> Any:
        training = self._training
        if training.mixed_precision not in AUTOCAST or training.deepspeed_plugin is not None:
            return nullcontext()  # DeepSpeed's weights have the dtype of the products
        return torch.autocast(training.device.type, dtype=AUTOCAST[training.mixed_precision])


def score_on_ranks(
    scorer: SequenceScorer,
    positions: np.ndarray,
    counts: np.ndarray,
    beat: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Score sequences on all ranks. Every rank gets all scores. This is a collective.

    Each rank scores every n-th batch. A rank that has no batch left scores one again, so that all ranks run
    the model equally often, as ZeRO-3 needs.

    Args:
        scorer: the scorer.
        positions: (sequences,) ascending positions among the distinct sequences of its dataset.
        counts: (sequences,) number of targets of each of them.
        beat: called after each batch.

    Returns:
        The scores of their targets, (targets,) float32, in the order of the positions.
    """
    is_parallel = torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if is_parallel else 1
    rank = torch.distributed.get_rank() if is_parallel else 0
    batches, own = scorer.batches(positions), []
    for start in range(0, len(batches), ranks):
        scored = scorer.score(batches[min(start + rank, len(batches) - 1)])
        if start + rank < len(batches):
            own.append(scored)
        beat()
    parts = [own]
    if is_parallel:
        parts = [[] for _ in range(ranks)]
        torch.distributed.all_gather_object(parts, own)
    return _in_order([scored for part in parts for scored in part], positions, counts)


def _in_order(scored: Sequence[Scored], positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the scores of all batches in the order of the positions."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    values = np.empty(int(offsets[-1]), dtype=np.float32)
    for batch, scores in scored:
        for start, span in _spans(np.searchsorted(positions, batch), offsets):
            values[span] = scores[start : start + span.stop - span.start]
    return values


def _spans(places: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield for each sequence of a batch where its scores begin in the batch, and their place among all."""
    start = 0
    for place in places.tolist():
        span = slice(int(offsets[place]), int(offsets[place + 1]))
        yield start, span
        start += span.stop - span.start
