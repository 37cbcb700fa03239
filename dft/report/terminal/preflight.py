"""The lines that `--preflight True` prints."""

from collections.abc import Sequence
from typing import Any

from dft.console import wrap
from dft.report.preflight_advice import SILENCED
from dft.report.terminal.foretelling import foretelling_lines


def preflight_lines(report: dict[str, Any], folder: str) -> list[str]:
    """Return the preflight report as lines of text.

    Args:
        report: `preflight_report`.
        folder: folder of the written report.
    """
    groups = {"all": report["whole"], **(report["files"] if len(report["files"]) > 1 else {})}
    width = max(4, *map(len, groups))
    lines = [*_statistics_lines(groups, width), *_histogram_lines(groups, width)]
    for name, statistics in groups.items():
        if statistics["silenced"]:
            tokens = ", ".join(
                f"{token['shown']} {token['silenced']:,}/{token['of']:,}" for token in statistics["silenced"]
            )
            label = f"{'silenced' if name == 'all' else '':<12}{name:<{width}}  "
            lines += wrap(label, tokens, len(label))
    for advice in report["advice"]:
        lines += wrap("advice", advice["recommendation"])
        lines += wrap("", f"because: {advice['evidence']}")
        lines += wrap("", f"source: {advice['source']}")
    if "objectives" in report:
        lines += foretelling_lines(report["objectives"])
    lines.append(f"report      {folder}/preflight.json, {folder}/preflight.html")
    return lines


def _statistics_lines(groups: dict[str, dict[str, Any]], width: int) -> list[str]:
    lines = [
        "preflight   scores of the model before training, on a sample of the training data",
        f"            {'':<{width}}  {'tokens':>9}  mean p     nll  entropy    acc  p end  kept  silenced",
    ]
    for name, statistics in groups.items():
        p_end = statistics["p_end_of_turn"]
        end = "    -" if p_end is None else f"{p_end:5.3f}"
        lines.append(
            f"            {name:<{width}}  {statistics['tokens']:>9,}  {statistics['avg_p_correct']:6.3f}  "
            f"{statistics['nll']:6.3f}  {statistics['entropy']:7.3f}  {statistics['acc']:5.3f}  {end}"
            f"  {100 * statistics['gradient_kept']:3.0f}%  {100 * statistics['silenced_share']:7.1f}%"
        )
    return [
        *lines,
        "            p end: mean p of end-of-turn tokens; kept: share of the SFT gradient that DFT keeps,",
        f"            sum(w |g|) / sum(|g|); silenced: tokens with p < {SILENCED:g}, which DFT barely trains",
    ]


def _histogram_lines(groups: dict[str, dict[str, Any]], width: int) -> list[str]:
    lower_ends = "  ".join(f"{tenth / 10:5.1f}" for tenth in range(10))
    lines = [f"{'tokens by p':<12}{'from':<{width}}  {lower_ends}"]
    for name, statistics in groups.items():
        shares = "  ".join(f"{share:5.1f}" for share in tenths(statistics["p_histogram"]))
        lines.append(f"            {name:<{width}}  {shares}  %")
    return lines


def tenths(counts: Sequence[int]) -> list[float]:
    """Return the percentage of tokens in each tenth of [0, 1].

    Args:
        counts: number of tokens in each twentieth of [0, 1].
    """
    total = max(sum(counts), 1)
    return [100 * sum(counts[start : start + 2]) / total for start in range(0, len(counts), 2)]
