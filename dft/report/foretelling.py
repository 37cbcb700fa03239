"""Estimates what each objective would do on the data, and recommends two to try.

Everything follows from scores of the untouched model; nothing is trained.

The size of a token's gradient is the 1-norm of its gradient on the logits, w * 2 (1 - p). Four things follow
from the weights of all objectives on the same tokens:

- kept: sum(w (1 - p)) / sum(1 - p) over some tokens, the share of SFT's gradient that an objective keeps.
- shares: how an objective divides its own gradient between tokens of low, middle and high p.
- noise: answers are scored under their own question and under that of another conversation. The tokens whose
  p is at least `QUESTION_RATIO` times as high under their own question depend on the question. noise is the
  share of an objective's gradient on these tokens that would go to the wrong pairs if half of the data were
  wrong.
- first step: see `dft.training.first_step`.

The objectives are ranked by m (1 - noise) + (1 - m) learning. m is the mean p of the data. learning is the
share of SFT's gradient kept on tokens of low p, divided by the objective's largest weight on the data (the
optimizer rescales gradients). The rule says in one formula what arXiv 2510.00526 reports: the stronger the
prior, the more an objective should rely on it, and the weaker, the more it should train unlikely tokens.
The formula is ours. It has no constants to tune, and was compared with measured results afterwards
(see docs/objectives.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dft.loss.objectives import OBJECTIVES, Dft, Objective, first_step_equivalent, make_objective
from dft.training.first_step import FirstStep
from dft.training.measuring.scoring import TokenTable

LOW, HIGH = 0.1, 0.9
"""Tokens have low p below the first value, high p from the second on, and middle p between."""
BANDS = ("low", "middle", "high")
QUESTION_RATIO = 2
"""A token depends on the question if its p is at least this many times as high under its own question."""
MIN_MARKED = 20
"""Minimum number of tokens that depend on the question, for the noise probe to mean anything."""
MIXTURE = Dft(0.5)
MAX_COSINE = 0.95
"""Two objectives whose gradients by token have a larger cosine are not both recommended."""

REGIMES = {
    "dft": ("made for domains that the model knows, such as mathematics and code", "2508.05629"),
    "dft, alpha 0.5": ("between DFT and SFT; no weight is below 0.5", "2508.05629; the mixture is ours"),
    "sft": ("best where the prior is weak: new facts, formats and languages", "2510.00526"),
    "power": ("between DFT and SFT, for models of medium strength in the domain", "2510.00526"),
    "threshold": ("leaves out the tokens that the model considers unlikely", "2510.00526"),
    "talr": ("like power with a lower bound, against forgetting", "2509.20758"),
    "chord": ("trains the tokens that the model is undecided about", "2508.11408"),
    "infosft": ("trains tokens of medium probability", "2605.14967"),
    "luffy": ("trains unlikely tokens, but not impossible ones, of demonstrations", "2504.14945"),
    "eaft": (
        "new knowledge with little forgetting; spares what contradicts a sure model",
        "2601.02151",
    ),
    "deft": ("as SFT where the model is undecided, as DFT where it is sure", "2602.11424"),
}
"""When the papers recommend an objective, and their arXiv numbers."""


def foretold_objectives() -> dict[str, Objective]:
    """Return all objectives at their defaults, and the mixture of DFT and SFT, by name."""
    objectives: dict[str, Objective] = {}
    for name in OBJECTIVES:
        objectives[name] = make_objective(name)
        if name == "dft":
            objectives["dft, alpha 0.5"] = MIXTURE
    return objectives


def flags_of(name: str) -> str:
    """Return the flags that select an objective of `foretold_objectives`."""
    by_alpha = {"dft": "--dft_alpha 1", "sft": "--dft_alpha 0", "dft, alpha 0.5": "--dft_alpha 0.5"}
    return by_alpha.get(name, f"--objective {name}")


def foretell(
    table: TokenTable,
    swapped: TokenTable | None,
    first_step: FirstStep | str,
    end_of_turn_ids: Sequence[int],
) -> dict[str, Any]:
    """Return what each objective would do, in the order of the ranking, and the two worth trying.

    Args:
        table: the scored tokens, with the weights of `foretold_objectives`.
        swapped: the scored tokens of `SwappedAnswers`; None if there are none.
        first_step: the derivatives, or the reason why they are missing.
        end_of_turn_ids: token ids that end a turn.
    """
    objectives = foretold_objectives()
    names = list(objectives)
    rows: dict[str, dict[str, Any]] = {name: {"flags": flags_of(name)} for name in names}
    for name, values in gradient_shares(table, end_of_turn_ids, names).items():
        rows[name] |= values
    noise = noise_shares(swapped, names)
    steps = {} if isinstance(first_step, str) else first_step.shares()
    same = {name: _equal_to(name, objectives) for name in names}
    mean_p = float(table.p_correct.mean())
    assert table.weights is not None
    own = table.weights / table.weights[:, [names.index("sft")]]  # without the weights of the data
    for index, (name, row) in enumerate(rows.items()):
        row["largest_weight"] = float(own[:, index].max())
        row["noise"] = None if isinstance(noise, str) else noise["shares"][name]
        row["first_step"] = steps.get(name)
        row["same_first_step_as"] = same[name]
        row["score"] = score(row, mean_p, has_probe=not isinstance(noise, str))

    def rank(name: str) -> tuple[float, float, int]:
        """Return the sort key: higher scores first, then more of SFT's gradient kept."""
        return -round(rows[name]["score"], 6), -(rows[name]["kept"]["all"] or 0.0), names.index(name)

    ordered = sorted(rows, key=rank)
    return {
        "mean_p": mean_p,
        "bands": {"low": LOW, "high": HIGH},
        "noise_probe": {"not_computed": noise} if isinstance(noise, str) else noise["counts"],
        "first_step": _describe(first_step),
        "ranking": {name: rows[name] for name in ordered},
        "try": picks(table, ordered, rows, names),
    }


def _describe(first_step: FirstStep | str) -> dict[str, Any]:
    if isinstance(first_step, str):
        return {"not_computed": first_step}
    return {
        "sequences": first_step.sequences,
        "tokens": first_step.tokens,
        "steepest": first_step.steepest,
        "rise": first_step.rise,
    }


def _equal_to(name: str, objectives: Mapping[str, Objective]) -> str | None:
    """Return the name of the objective whose first step is the same, if this one compares with the base."""
    equivalent = first_step_equivalent(objectives[name])
    if equivalent is objectives[name]:
        return None
    return next(other for other, objective in objectives.items() if objective == equivalent)


def bands_of(p: np.ndarray) -> dict[str, np.ndarray]:
    """Return the masks of tokens of low, middle and high p."""
    low, high = p < LOW, p >= HIGH
    return {"low": low, "middle": ~low & ~high, "high": high}


def gradient_shares(
    table: TokenTable, end_of_turn_ids: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return `kept` and `shares` of each objective, see the module docstring.

    Returns:
        By name: `kept` on all tokens, on each band and on end-of-turn tokens (None where SFT has no gradient
        there); `shares` of each band in the objective's own gradient (None if it has none).
    """
    assert table.weights is not None
    p = table.p_correct
    sizes = table.weights * (1 - p)[:, None]  # (tokens, objectives)
    groups = {"all": np.ones(len(p), dtype=bool), **bands_of(p)}
    groups["end_of_turn"] = np.isin(table.target, list(end_of_turn_ids))
    sums = {group: sizes[mask].sum(0) for group, mask in groups.items()}
    sft = names.index("sft")

    def ratio(part: float, whole: float) -> float | None:
        return float(part / whole) if whole > 0 else None

    return {
        name: {
            "kept": {group: ratio(of[index], of[sft]) for group, of in sums.items()},
            "shares": {band: ratio(sums[band][index], sums["all"][index]) for band in BANDS},
        }
        for index, name in enumerate(names)
    }


def noise_shares(table: TokenTable | None, names: Sequence[str]) -> dict[str, Any] | str:
    """Return the share of each objective's gradient that goes to swapped answers, or why it is missing.

    The share of an objective without a gradient on the marked tokens is None.
    """
    if table is None or not len(table):
        return "the data has no two conversations whose questions can be exchanged"
    assert table.weights is not None
    swapped = table.line == 1
    own, other = table.select(~swapped), table.select(swapped)
    assert own.weights is not None and other.weights is not None
    assert np.array_equal(own.target, other.target)
    marked = other.nll - own.nll >= np.log(QUESTION_RATIO)  # of p, both may round to 0
    counts = {"pairs": len(np.unique(table.file)), "tokens": len(own), "marked": int(marked.sum())}
    if counts["marked"] < MIN_MARKED:
        return (
            f"only {counts['marked']} of {counts['tokens']:,} tokens of answers depend on the question for "
            f"this model (p at least {QUESTION_RATIO} times as high as under another question)"
        )
    right = (own.weights[marked] * (1 - own.p_correct[marked])[:, None]).sum(0)
    wrong = (other.weights[marked] * (1 - other.p_correct[marked])[:, None]).sum(0)
    totals = right + wrong
    shares = [float(part / total) if total > 0 else None for part, total in zip(wrong, totals, strict=True)]
    return {"counts": counts, "shares": dict(zip(names, shares, strict=True))}


def score(row: Mapping[str, Any], mean_p: float, has_probe: bool = True) -> float:
    """Return the value that objectives are ranked by, between 0 and 1; see the module docstring.

    Without the noise probe, the tokens of low p stand for those that are wrong. An objective without a
    gradient on the tokens in question counts as one that divides it equally. Without tokens of low p, there
    is nothing to learn there, and learning is 1 for all.
    """
    noise = row["noise"] if has_probe else row["shares"]["low"]
    kept, largest = row["kept"]["low"], row["largest_weight"]
    learning = 1.0 if kept is None else min(1.0, kept / largest) if largest else 0.0
    return mean_p * (1 - (0.5 if noise is None else noise)) + (1 - mean_p) * learning


def picks(
    table: TokenTable, ordered: Sequence[str], rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, str]]:
    """Return the two objectives worth trying, with reasons.

    They are the first of the ranking, and the next one whose gradients by token differ from the first one's.
    Objectives whose first step is that of another one are left out.
    """
    assert table.weights is not None
    sizes = table.weights * (1 - table.p_correct)[:, None]
    eligible = [name for name in ordered if rows[name]["same_first_step_as"] is None]
    first = eligible[0]
    base = sizes[:, names.index(first)]

    def differs(name: str) -> bool:
        column = sizes[:, names.index(name)]
        norms = np.linalg.norm(base) * np.linalg.norm(column)
        return bool(norms > 0 and base @ column < MAX_COSINE * norms)

    second = next((name for name in eligible[1:] if differs(name)), eligible[1])
    return [{"name": name, "flags": flags_of(name), **_reason(name, rows)} for name in (first, second)]


def _reason(name: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return why an objective is worth trying, and the paper that says when it is."""
    row, sft, parts = rows[name], rows["sft"], []
    if (kept := row["kept"]["low"]) is not None:
        parts.append(f"it keeps {kept:.0%} of SFT's gradient on tokens with p < {LOW:g}")
    if row["noise"] is not None:
        comparison = "" if name == "sft" else f" (SFT: {sft['noise']:.0%})"
        parts.append(
            f"if half of the answers were wrong, {row['noise']:.0%} of its gradient would go to them"
            + comparison
        )
    ends = row["kept"]["end_of_turn"]
    if ends is not None and ends < LOW:
        parts.append(
            f"it keeps {ends:.0%} of SFT's gradient on end-of-turn tokens: add --end_of_turn_weight 0.1"
        )
    regime, paper = REGIMES[name]
    return {
        "reason": "; ".join(parts) or "no token has a low p",
        "regime": regime,
        "source": f"arXiv {paper}",
    }
