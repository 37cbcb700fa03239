"""Truncation of sequences to --max_length."""

import numpy as np

from dft.data.conversations.faults import BadLine
from dft.data.preparing.conversation_counts import ConversationCounts
from dft.data.preparing.options import PrepareOptions
from dft.data.templates.encoder import Example
from dft.labels import IGNORE_INDEX

OVER_LIMIT = "longer than --max_length"


def truncate(example: Example, options: PrepareOptions, counts: ConversationCounts) -> Example | None:
    """Return a sequence cut to `options.max_length` tokens, or None if no supervised token is left.

    The lost supervised tokens and turn endings are added to `counts`. The first token of a sequence that is
    truncated on the left is not supervised, because its context is missing.

    Raises:
        BadLine: the sequence is too long and `options.truncation` is "error".
    """
    length, limit = len(example.input_ids), options.max_length
    before = count_supervised(example.labels)
    if length <= limit:
        return example if before else None
    if options.truncation == "error":
        raise BadLine(f"{length:,} tokens, longer than --max_length {limit}", OVER_LIMIT)
    if options.truncation == "drop":
        counts.lost_supervised += before
        counts.lost_endings += len(example.ends)
        return None
    start = length - limit if options.truncation == "left" else 0
    labels = example.labels[start : start + limit].copy()
    labels[0] = IGNORE_INDEX
    complete = (example.ends > start) & (example.ends < start + limit)  # (turns,)
    after = count_supervised(labels)
    counts.lost_supervised += before - after
    counts.lost_endings += int((~complete).sum())
    if not after:
        return None
    endings = tuple(ending for ending, is_left in zip(example.endings, complete, strict=True) if is_left)
    weights = example.loss_weights
    weights = None if weights is None else weights[start : start + limit]
    ids, ends = example.input_ids[start : start + limit], example.ends[complete] - start
    return Example(ids, labels, endings, ends, weights)


def count_supervised(labels: np.ndarray) -> int:
    """Return the number of supervised tokens."""
    return int(np.count_nonzero(labels != IGNORE_INDEX))
