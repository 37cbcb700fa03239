"""Contents of data_report.json: counts of the records read, their outcome, and the contents of each split."""

from typing import Any

import numpy as np

from dft.data.preparing.conversation_counts import ConversationCounts
from dft.data.preparing.encoded_sequences import EncodedSequences
from dft.data.preparing.evaluation_sets import splits_of
from dft.data.preparing.packing import density
from dft.data.preparing.quality import find_warnings
from dft.data.preparing.selection import Split, UnusedCounts
from dft.data.preparing.weight_counts import count_weights

PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)
HISTOGRAM_BINS = 20
LONGEST = 5
"""Number of longest sequences that are listed with file and line."""


def build_report(
    splits: dict[str, Split],
    counts: dict[str, list[ConversationCounts]],
    unused: UnusedCounts,
    max_length: int,
    weights: list[float],
) -> dict[str, Any]:
    """Return the report, with files by number; see `add_file_names`.

    Args:
        splits: "train" and the evaluation sets, as selected.
        counts: counts of each of the "train" and the "eval" files, before selection.
        unused: numbers of conversations that are not part of any split.
        max_length: number of tokens that a packed row holds.
        weights: weight of each training file.
    """
    total = sum((part for group in counts.values() for part in group), ConversationCounts())
    endings = dict(total.endings.most_common())
    turns = np.repeat([*total.turns.keys()] or [0], [*total.turns.values()] or [1])
    report: dict[str, Any] = {
        "conversations_read": total.read,
        "rejected": total.rejected.total(),
        "rejected_by_reason": dict(total.rejected.most_common()),
        "dropped_without_supervised_tokens": total.dropped,
        "dropped_for_their_length": total.too_long,
        "truncated_conversations": total.truncated,
        "lost_supervised_tokens": total.lost_supervised,
        "lost_end_tokens": total.lost_endings,
        "repeated_conversations_dropped": unused.repeated,
        "eval_conversations_dropped_because_in_train": unused.shared,
        "conversations_not_drawn": unused.not_drawn,
        "turns_without_stop_token": endings.pop(None, 0),
        "end_of_turn_tokens": endings,
        "unknown_tokens": total.unknown,
        "remarks": [
            {"remark": remark, "sequences": count, "example": total.remark_examples[remark]}
            for remark, count in total.remarks.most_common()
        ],
        "rows_left_out": dict(total.left_out.most_common()),
        "unread_columns": dict(total.unread.most_common()),
        "roles": dict(total.roles.most_common()),
        "turns_per_conversation": percentiles(turns),
        "files": {name: [_file_counts(part) for part in group] for name, group in counts.items() if group},
        "warnings": find_warnings({name: split.encoded for name, split in splits.items()}),
        "splits": list(splits),
        **{name: _split_report(split, max_length) for name, split in splits.items()},
    }
    for entry, weight in zip(report["files"]["train"], weights, strict=True):
        entry["weight"] = weight
    for entry in report["train"]["files"]:
        entry["weight"] = weights[entry["file"]]
    return report


def _split_report(split: Split, max_length: int) -> dict[str, Any]:
    """Return the numbers of one split, in total and per file."""
    encoded = split.encoded
    bounds = (0, max(encoded.lengths.max(), HISTOGRAM_BINS))
    histogram, edges = np.histogram(encoded.lengths, bins=HISTOGRAM_BINS, range=bounds)
    longest = np.argsort(-encoded.lengths, kind="stable")[:LONGEST]
    report = {
        **_split_counts(encoded),
        "different_conversations": len(np.unique(encoded.token_digests)),
        "supervised_share": float(encoded.supervised.sum() / encoded.lengths.sum()),
        "length_percentiles": percentiles(encoded.lengths),
        "length_histogram": {"edges": [round(edge) for edge in edges], "counts": histogram.tolist()},
        "longest": [
            {
                "file": int(encoded.sources[index]),
                "line": int(encoded.lines[index]),
                "tokens": int(encoded.lengths[index]),
            }
            for index in longest
        ],
        "rows": len(encoded),
        "files": _split_counts_by_file(encoded),
    }
    if (weights := count_weights(encoded)) is not None:
        report["loss_weights"] = weights
    if split.offsets is not None:
        rows = len(split.offsets) - 1
        report |= {"rows": rows, "packing_density": density(encoded.lengths, rows, max_length)}
    return report


def percentiles(values: np.ndarray) -> dict[str, int]:
    """Return the values at `PERCENTILES`, by percentile."""
    levels = np.percentile(values, PERCENTILES, method="higher")
    return {str(percentile): int(level) for percentile, level in zip(PERCENTILES, levels, strict=True)}


def file_group(split: str, names: dict[str, list[str]]) -> str:
    """Return which files a split comes from, the "train" or the "eval" files.

    An evaluation set comes from the "train" files if it is held out of them.
    """
    return "eval" if split != "train" and names["eval"] else "train"


def add_file_names(report: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return a copy of a report with file names in place of file numbers.

    Args:
        report: from `build_report`.
        names: names of the "train" and the "eval" files, by file number.
    """
    named_report = dict(report)
    named_report["files"] = {
        group: [{"file": name, **entry} for name, entry in zip(names[group], entries, strict=True)]
        for group, entries in report["files"].items()
    }
    named_report["warnings"] = [
        {
            **entry,
            "examples": [
                _place(place, names[file_group(entry["split"], names)]) for place in entry["examples"]
            ],
        }
        for entry in report["warnings"]
    ]
    for split in splits_of(report):
        group_names = names[file_group(split, names)]
        named_entries = {
            key: [{**entry, "file": group_names[entry["file"]]} for entry in report[split][key]]
            for key in ("files", "longest")
        }
        named_report[split] = {**report[split], **named_entries}
    return named_report


def _place(place: dict[str, int], names: list[str]) -> str:
    return f"{names[place['file']]}:{place['line']}"


def _file_counts(counts: ConversationCounts) -> dict[str, int]:
    return {
        "read": counts.read,
        "rejected": counts.rejected.total(),
        "dropped": counts.dropped + counts.too_long,
        "truncated": counts.truncated,
    }


def _split_counts(encoded: EncodedSequences) -> dict[str, int]:
    return {
        "conversations": encoded.count_conversations(),
        "sequences": len(encoded),
        "repeated_sequences": len(encoded) - len(np.unique(encoded.rows)),
        "tokens": int(encoded.lengths.sum()),
        "supervised_tokens": int(encoded.supervised.sum()),
    }


def _split_counts_by_file(encoded: EncodedSequences) -> list[dict[str, int]]:
    _, first_of_conversation = np.unique(encoded.conversations, return_index=True)
    _, first_of_row = np.unique(encoded.rows, return_index=True)
    sequences = np.bincount(encoded.sources)
    # Weighted sums are float64, which is exact up to 2**53 tokens.
    columns = {
        "conversations": np.bincount(encoded.sources[first_of_conversation]),
        "sequences": sequences,
        "repeated_sequences": sequences - np.bincount(encoded.sources[first_of_row]),
        "tokens": np.bincount(encoded.sources, weights=encoded.lengths),
        "supervised_tokens": np.bincount(encoded.sources, weights=encoded.supervised),
    }
    return [
        {"file": int(source), **{name: int(values[source]) for name, values in columns.items()}}
        for source in np.unique(encoded.sources)
    ]
