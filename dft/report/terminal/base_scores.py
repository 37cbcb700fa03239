"""Lines on the tokens that are not trained on for their base scores."""

from collections.abc import Mapping
from typing import Any

from dft.console import wrap


def filter_lines(counts: Mapping[str, Any], max_files: int) -> list[str]:
    """Return lines on the supervised tokens that --drop_tokens_below_base_p leaves out.

    Args:
        counts: `base_filter` of the data report.
        max_files: number of files that are listed at most.
    """
    total, dropped = counts["supervised_tokens"], counts["dropped_tokens"]
    text = (
        f"{dropped:,} of {total:,} supervised tokens ({100 * dropped / max(1, total):.1f} %) have a base p "
        f"below {counts['min_base_p']:g} and are not trained on"
    )
    if counts["dropped_sequences"]:
        text += (
            f"; {counts['dropped_sequences']:,} of {counts['sequences']:,} sequences have no other and are "
            "left out"
        )
    if counts["exempt_end_of_turn_tokens"]:
        text += f"; {counts['exempt_end_of_turn_tokens']:,} end-of-turn tokens below it stay"
    lines = wrap("base p", text)
    if len(counts["files"]) > 1:
        for entry in counts["files"][:max_files]:
            share = 100 * entry["dropped_tokens"] / max(1, entry["supervised_tokens"])
            lines.append(f"            {entry['file']}: {entry['dropped_tokens']:,} ({share:.1f} %)")
        if len(counts["files"]) > max_files:
            lines.append(f"            ... and {len(counts['files']) - max_files:,} more files")
    return lines
