"""The lines of `--preflight True` about what each objective would do."""

from collections.abc import Mapping
from typing import Any

from dft.console import wrap


def foretelling_lines(foretold: Mapping[str, Any]) -> list[str]:
    """Return the ranking of the objectives and the two worth trying as lines of text.

    Args:
        foretold: the result of `foretell`.
    """
    low, high = foretold["bands"]["low"], foretold["bands"]["high"]
    width = max(len("objective"), *map(len, foretold["ranking"]))
    band = f"kept on p <{low:g}  to {high:g}  above   ends"
    lines = [
        "objectives  ranked by what a first step of each would do; nothing was trained",
        f"            {'objective':<{width}}  {band}  noise  rise  score",
    ]
    for name, row in foretold["ranking"].items():
        kept = row["kept"]
        shares = f"{_percent(kept['low']):>11}  {_percent(kept['middle']):>6}  {_percent(kept['high']):>5}"
        numbers = f"{shares}  {_percent(kept['end_of_turn']):>5}  {_percent(row['noise']):>5}"
        same = row["same_first_step_as"]
        note = f"  as {same}" if same else ""
        rise = _percent(row["first_step"])
        lines.append(f"            {name:<{width}}  {numbers}  {rise:>4}  {row['score']:5.2f}{note}")
    explanation = (
        "kept: share of SFT's gradient. noise: share of the gradient that would go to answers under a wrong "
        "question, if half of them were. rise: change of the mean p of other conversations by a small step, "
        "as a share of the largest that is possible"
    )
    lines += wrap("", explanation)
    for probe, text in (("noise_probe", "noise"), ("first_step", "rise")):
        if reason := foretold[probe].get("not_computed"):
            lines += wrap("", f"{text} was not computed: {reason}")
    for pick in foretold["try"]:
        label = "try" if pick is foretold["try"][0] else "and"
        lines += wrap(label, f"{pick['flags']}: {pick['reason']}")
        lines += wrap("", f"when: {pick['regime']} ({pick['source']})")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"
