"""The numbers of the data report: what was read, what became of it, and what is trained on."""

from typing import Any

import numpy as np

from dft.data.preparing.chunk import Totals
from dft.data.preparing.encode import Encoded
from dft.data.preparing.packing import density
from dft.data.preparing.selection import LeftOut, Split, conversation_count

PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)
BINS = 20
"""Of the histogram of lengths."""
NAMED = 5
"""Sequences that are named."""


def report_of(
    splits: dict[str, Split],
    totals: dict[str, list[Totals]],
    left_out: LeftOut,
    max_length: int,
    weights: list[float],
) -> dict[str, Any]:
    """Numbers of what was read, before any selection, and of each split as it is trained or evaluated on.

    Args:
        splits: "train" and, if any, "eval", as selected.
        totals: of each file, of those to train on and of those to evaluate on.
        max_length: the tokens that a row may have.
        weights: how often each of the files to train on is taken.
    """
    whole = sum((one for group in totals.values() for one in group), Totals())
    endings = dict(whole.endings.most_common())
    turns = np.repeat([*whole.turns.keys()] or [0], [*whole.turns.values()] or [1])
    report = {
        "conversations_read": whole.read,
        "rejected": whole.rejected.total(),
        "rejected_by_reason": dict(whole.rejected.most_common()),
        "dropped_without_supervised_tokens": whole.dropped,
        "dropped_for_their_length": whole.too_long,
        "truncated_conversations": whole.truncated,
        "lost_supervised_tokens": whole.lost_supervised,
        "lost_end_tokens": whole.lost_endings,
        "repeated_conversations_dropped": left_out.repeated,
        "eval_conversations_dropped_because_in_train": left_out.shared,
        "conversations_not_drawn": left_out.not_drawn,
        "turns_without_stop_token": endings.pop(None, 0),
        "end_of_turn_tokens": endings,
        "unknown_tokens": whole.unknown,
        "roles": dict(whole.roles.most_common()),
        "turns_per_conversation": percentiles(turns),
        "files": {name: [_read_of(one) for one in group] for name, group in totals.items() if group},
        **{name: split_report(split, max_length) for name, split in splits.items()},
    }
    for entry, weight in zip(report["files"]["train"], weights, strict=True):
        entry["weight"] = weight
    for entry in report["train"]["files"]:
        entry["weight"] = weights[entry["file"]]
    return report


def split_report(split: Split, max_length: int) -> dict[str, Any]:
    """Numbers of one split; `files` lists them for each file that is in it."""
    encoded = split.encoded
    counts, edges = np.histogram(encoded.lengths, bins=BINS, range=(0, max(encoded.lengths.max(), BINS)))
    longest = np.argsort(-encoded.lengths, kind="stable")[:NAMED]
    report = {
        **_counts(encoded),
        "different_conversations": len(np.unique(encoded.keys)),
        "supervised_share": encoded.supervised.sum() / encoded.lengths.sum(),
        "length_percentiles": percentiles(encoded.lengths),
        "length_histogram": {"edges": [round(edge) for edge in edges], "counts": counts.tolist()},
        "longest": [
            {
                "file": int(encoded.sources[one]),
                "line": int(encoded.lines[one]),
                "tokens": int(encoded.lengths[one]),
            }
            for one in longest
        ],
        "rows": len(encoded),
        "files": _counts_by_file(encoded),
    }
    if split.offsets is not None:
        rows = len(split.offsets) - 1
        report |= {"rows": rows, "packing_density": density(encoded.lengths, rows, max_length)}
    return plain(report)


def percentiles(values: np.ndarray) -> dict[str, int]:
    levels = np.percentile(values, PERCENTILES, method="higher")
    return {str(at): int(level) for at, level in zip(PERCENTILES, levels, strict=True)}


def group_of(split: str, names: dict[str, list[str]]) -> str:
    """Which files a split is of: "eval" are files of their own, or held out of those to train on."""
    return "eval" if split == "eval" and names["eval"] else "train"


def named(report: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The report with files by name where it has their numbers."""
    made = dict(report)
    made["files"] = {
        group: [{"file": name, **entry} for name, entry in zip(names[group], entries, strict=True)]
        for group, entries in report["files"].items()
    }
    for split in ("train", "eval"):
        if split in report:
            of = names[group_of(split, names)]
            made[split] = {
                **report[split],
                **{
                    key: [{**entry, "file": of[entry["file"]]} for entry in report[split][key]]
                    for key in ("files", "longest")
                },
            }
    return made


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """numpy's numbers as Python's, which JSON can write."""
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in report.items()}


def _read_of(totals: Totals) -> dict[str, int]:
    return {
        "read": totals.read,
        "rejected": totals.rejected.total(),
        "dropped": totals.dropped + totals.too_long,
        "truncated": totals.truncated,
    }


def _counts(encoded: Encoded) -> dict[str, int]:
    return {
        "conversations": conversation_count(encoded),
        "sequences": len(encoded),
        "repeated_sequences": len(encoded) - len(np.unique(encoded.rows)),
        "tokens": int(encoded.lengths.sum()),
        "supervised_tokens": int(encoded.supervised.sum()),
    }


def _counts_by_file(encoded: Encoded) -> list[dict[str, int]]:
    _, first = np.unique(encoded.conversations, return_index=True)
    once = np.unique(encoded.rows, return_index=True)[1]
    # Sums of doubles are exact up to 2**53 tokens.
    columns = {
        "conversations": np.bincount(encoded.sources[first]),
        "sequences": np.bincount(encoded.sources),
        "repeated_sequences": np.bincount(encoded.sources) - np.bincount(encoded.sources[once]),
        "tokens": np.bincount(encoded.sources, weights=encoded.lengths),
        "supervised_tokens": np.bincount(encoded.sources, weights=encoded.supervised),
    }
    return [
        {"file": int(source), **{name: int(values[source]) for name, values in columns.items()}}
        for source in np.unique(encoded.sources)
    ]
