"""Counts of supervised tokens by their weight in the loss, for the data report."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from dft.data.preparing.encoded_sequences import EncodedSequences
from dft.labels import IGNORE_INDEX

MAX_LISTED = 20
"""Number of weights that the report lists; the others are only counted."""


def count_weights(encoded: EncodedSequences) -> dict[str, Any] | None:
    """Return how many supervised tokens of a split have which weight, or None if all weights are 1.

    Returns:
        `mean`: mean weight of the supervised tokens. `different`: number of different weights.
        `tokens`: number of supervised tokens by weight, of the most common weights.
    """
    times = np.bincount(encoded.rows)  # (sequences up to the last one,): how often the split has each
    counts: Counter[float] = Counter()
    first = 0
    with pa.memory_map(str(encoded.path)) as source, pa.ipc.open_stream(source) as reader:
        if "loss_weights" not in reader.schema.names:
            return None
        for batch in reader:
            own = np.zeros(batch.num_rows, dtype=np.int64)
            part = times[first : first + batch.num_rows]
            own[: len(part)] = part
            first += batch.num_rows
            counts.update(_count_batch(batch, own))
    counts[1.0] += int(encoded.supervised.sum()) - counts.total()
    total = counts.total()
    if counts[1.0] == total:
        return None
    listed = sorted(counts.most_common(MAX_LISTED))
    return {
        "mean": sum(weight * count for weight, count in counts.items()) / total,
        "different": len(+counts),
        "tokens": {f"{weight:g}": count for weight, count in listed if count},
    }


def _count_batch(batch: pa.RecordBatch, times: np.ndarray) -> dict[float, int]:
    """Return the number of supervised tokens by weight, in the sequences that have weights.

    Args:
        times: (sequences,) how often the split has each sequence of the batch.
    """
    is_weighted = batch.column("loss_weights").is_valid()
    weights = batch.column("loss_weights").drop_null()
    if not len(weights):
        return {}
    labels = batch.column("labels").filter(is_weighted)
    lengths = np.diff(labels.offsets.to_numpy())
    repeated = np.repeat(times[is_weighted.to_numpy(zero_copy_only=False)], lengths)
    repeated[labels.flatten().to_numpy() == IGNORE_INDEX] = 0
    values, inverse = np.unique(weights.flatten().to_numpy(), return_inverse=True)
    sums = np.bincount(inverse, weights=repeated)
    return {float(value): int(count) for value, count in zip(values, sums, strict=True)}
