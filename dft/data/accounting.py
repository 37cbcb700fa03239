"""The numbers of the data report: what was read, what became of it, and what is trained on."""

from typing import Any

import numpy as np

from dft.data.encode import Encoded, Totals

PERCENTILES = (0, 50, 90, 99, 100)


def report_of(splits: dict[str, Encoded], totals: Totals, in_train: int) -> dict[str, Any]:
    """Numbers of what was read, before any selection, and of each split as it is trained or evaluated on.

    Args:
        splits: "train" and, if any, "eval", as selected.
        totals: of all files together.
        in_train: conversations of the evaluation files that were left out because they are trained on.
    """
    endings = dict(totals.endings.most_common())
    return {
        "conversations_read": totals.conversations.total(),
        "dropped_without_supervised_tokens": totals.dropped.total(),
        "truncated_conversations": totals.truncated,
        "truncated_supervised_tokens": totals.truncated_supervised,
        "eval_conversations_dropped_because_in_train": in_train,
        "turns_without_stop_token": endings.pop(None, 0),
        "end_of_turn_tokens": endings,
        **{name: split_report(encoded) for name, encoded in splits.items()},
    }


def split_report(encoded: Encoded) -> dict[str, Any]:
    """Numbers of one split; `files` lists them for each file in order."""
    lengths = encoded.lengths if len(encoded) else [0]
    levels = np.percentile(lengths, PERCENTILES, method="higher")
    return {
        **_counts(encoded),
        "different_conversations": len(np.unique(encoded.keys)),
        "length_percentiles": {str(at): int(level) for at, level in zip(PERCENTILES, levels, strict=True)},
        "files": [
            {"file": name, **_counts(encoded.take(encoded.sources == number))}
            for number, name in enumerate(encoded.files)
        ],
    }


def _counts(encoded: Encoded) -> dict[str, int]:
    return {
        "conversations": len(np.unique(encoded.conversations)),
        "sequences": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "supervised_tokens": int(encoded.supervised.sum()),
    }
