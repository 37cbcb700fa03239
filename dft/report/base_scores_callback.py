"""The callback that compares p before and after training for the report."""

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

SEQUENCES = 256
"""Maximum number of sequences of each data file that are scored again after training."""
BINS = 20
"""Number of bins of p before and after."""
EXAMPLES = 8
"""Number of tokens that are shown whose p rose most, and fell most."""
CONTEXT = 16
"""Number of tokens before such a token that are shown."""


class ComparedTrainer(Protocol):
    """Interface of the trainer that the callback uses; implemented by `DFTTrainer`."""

    model: Any
    model_wrapped: Any
    args: TrainingArguments


class BaseScoresCallback(TrainerCallback):
    """Scores a sample again at the end of training, and adds a comparison to the record of the report.

    Args:
        trainer: the trainer.
        record: `dft.report.run_record.run_record`; receives `base_scores`.
        dataset: data with base scores: the first evaluation set, or the training data if there is none.
        split: its name.
        fused_head: value of --fused_head.
        tokenizer: decodes the tokens of the examples.
    """

    def __init__(
        self,
        trainer: ComparedTrainer,
        record: dict[str, Any],
        dataset: Sequences,
        split: str,
        fused_head: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._trainer, self._record, self._dataset, self._split = trainer, record, dataset, split
        self._fused_head, self._tokenizer = fused_head, tokenizer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the tokens on all ranks. Training has ended, so this does not count as its time."""
        sample = self._dataset.sample(SEQUENCES, args.seed)
        model, forward = self._trainer.model, self._trainer.model_wrapped
        longest = int(sample.lengths.max())
        scorer = SequenceScorer(model, forward, args, sample, self._fused_head, longest)
        comparison = compare(scorer, sample)
        self._record["base_scores"] = describe(comparison, self._split, state.global_step, self._tokenizer)
        before, after = comparison.before.mean(), comparison.after.mean()
        say(
            f"base p      mean p of {len(comparison.before):,} {self._split} tokens: {before:.4f} before "
            f"training, {after:.4f} after"
        )


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
