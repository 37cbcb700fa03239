"""The callback that compares p before and after training for the report."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dft.console import say
from dft.data.batches.dataset import Sequences
from dft.report.report_callback import token_texts
from dft.training.base_scores.comparison import Comparison, compare
from dft.training.base_scores.scorer import SequenceScorer
from dft.training.checkpoints.run_state import weights_step

SEQUENCES = 256
"""Maximum number of sequences of each data file that are scored again after training."""
BINS = 20
"""Number of bins of p before and after."""
EXAMPLES = 8
"""Number of tokens that are shown whose p rose most, and fell most."""
CONTEXT = 16
"""Number of tokens before such a token that are shown."""


class ComparedTrainer(Protocol):
    """Interface of the trainer that the callback uses; implemented by `DFTTrainer`.

    Attributes:
        averaged: returns a context in which the model has the average of its weights, if the run keeps one.
    """

    model: Any
    model_wrapped: Any
    args: TrainingArguments
    averaged: Callable[[], AbstractContextManager[None]]


class BaseScoresCallback(TrainerCallback):
    """Scores a sample again at the end of training, and adds a comparison to the record of the report.

    Args:
        trainer: the trainer.
        record: `dft.report.run_record.run_record`; receives `base_scores`.
        datasets: data with base scores by name: the evaluation sets, or the training data if there are none.
        fused_head: value of --fused_head.
        tokenizer: decodes the tokens of the examples.
    """

    def __init__(
        self,
        trainer: ComparedTrainer,
        record: dict[str, Any],
        datasets: Mapping[str, Sequences],
        fused_head: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._trainer, self._record, self._datasets = trainer, record, datasets
        self._fused_head, self._tokenizer = fused_head, tokenizer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the tokens on all ranks, with the weights that the final model will have.

        Training has ended, so this does not count as its time.
        """
        step = weights_step(state, args, is_training=False)
        self._record["base_scores"] = comparisons = []
        with self._trainer.averaged():
            compared = {
                split: self._compare(dataset.sample(SEQUENCES, args.seed), args)
                for split, dataset in self._datasets.items()
            }
        for split, comparison in compared.items():
            comparisons.append(describe(comparison, split, step, self._tokenizer))
            before, after = comparison.before.mean(), comparison.after.mean()
            say(
                f"base p      mean p of {len(comparison.before):,} {split} tokens: {before:.4f} before "
                f"training, {after:.4f} after"
            )

    def _compare(self, sample: Sequences, args: TrainingArguments) -> Comparison:
        model, forward = self._trainer.model, self._trainer.model_wrapped
        longest = int(sample.lengths.max())
        return compare(SequenceScorer(model, forward, args, sample, self._fused_head, longest), sample)


def describe(
    comparison: Comparison, split: str, step: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the comparison for the report.

    Args:
        comparison: the compared tokens.
        split: name of the data they are from.
        step: optimizer steps of the trained model.
        tokenizer: decodes the tokens.
    """
    edges = np.linspace(0, 1, BINS + 1)
    pairs = np.clip(comparison.before, 0, 1), np.clip(comparison.after, 0, 1)  # float32 may exceed 1
    counts, _, _ = np.histogram2d(*pairs, bins=[edges, edges])
    return {
        "split": split,
        "step": step,
        "tokens": len(comparison.before),
        "mean_before": float(comparison.before.mean()),
        "mean_after": float(comparison.after.mean()),
        "counts": counts.astype(int).tolist(),  # [bin of p before][bin of p after]
        "rises": [
            _example(comparison, token, tokenizer) for token in comparison.largest_changes(EXAMPLES, 1)
        ],
        "falls": [
            _example(comparison, token, tokenizer) for token in comparison.largest_changes(EXAMPLES, -1)
        ],
    }


def _example(comparison: Comparison, token: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a token with the text before it, its source and both probabilities."""
    row, place = int(comparison.row[token]), int(comparison.place[token])
    ids = comparison.sequences[row]["input_ids"][max(0, place - CONTEXT) : place + 1].tolist()
    texts = token_texts(tokenizer, ids)
    file, line = comparison.sequences.origins(row)[0]
    return {
        "file": comparison.sequences.files[file],
        "line": line,
        "context": "".join(texts[:-1]),
        "token": texts[-1],
        "before": float(comparison.before[token]),
        "after": float(comparison.after[token]),
    }
