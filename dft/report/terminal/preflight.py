"""The preflight report as lines of text."""

from collections.abc import Sequence
from typing import Any

from dft.report.preflight_advice import SILENCED


def preflight_lines(report: dict[str, Any], folder: str) -> list[str]:
    """The report for a terminal."""
    groups = {"all": report["whole"], **(report["files"] if len(report["files"]) > 1 else {})}
    width = max(4, *map(len, groups))
    lines = [
        "preflight   the untouched model on a sample of the training data; nothing was trained",
        f"            {'':<{width}}  {'tokens':>9}  mean p     nll  entropy    acc  p end  kept  silenced",
    ]
    for name, one in groups.items():
        end = "    -" if one["p_end_of_turn"] is None else f"{one['p_end_of_turn']:5.3f}"
        lines.append(
            f"            {name:<{width}}  {one['tokens']:>9,}  {one['avg_p_correct']:6.3f}  "
            f"{one['nll']:6.3f}  {one['entropy']:7.3f}  {one['acc']:5.3f}  {end}"
            f"  {100 * one['gradient_kept']:3.0f}%  {100 * one['silenced_share']:7.1f}%"
        )
    lines += [
        "            p end: of end-of-turn tokens; kept: DFT's share of SFT's gradient, sum(w |g|) / "
        "sum(|g|);",
        f"            silenced: tokens with p < {SILENCED:g}, which DFT leaves as they are",
        f"{'p':<12}{'from':<{width}}  {'  '.join(f'{tenth / 10:4.1f}' for tenth in range(10))}",
    ]
    for name, one in groups.items():
        shares = "  ".join(f"{share:4.1f}" for share in tenths(one["p_histogram"]))
        lines.append(f"            {name:<{width}}  {shares}  % of the tokens")
    for name, one in groups.items():
        if one["silenced"]:
            told = ", ".join(f"{of['shown']} {of['silenced']:,}/{of['of']:,}" for of in one["silenced"])
            lines.append(f"{'silenced' if name == 'all' else '':<12}{name:<{width}}  {told}")
    for one in report["advice"]:
        lines += [
            f"advice      {one['recommendation']}",
            f"            because: {one['evidence']}",
            f"            source: {one['source']}",
        ]
    lines.append(f"report      {folder}/preflight.json, {folder}/preflight.html")
    return lines


def tenths(counts: Sequence[int]) -> list[float]:
    """Percent of the tokens in each tenth of [0, 1], of counts in twentieths."""
    total = max(sum(counts), 1)
    return [100 * sum(counts[start : start + 2]) / total for start in range(0, len(counts), 2)]
