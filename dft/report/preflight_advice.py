"""Whether DFT fits the data, judged by what the untouched model thinks of a sample of it.

The rule, and where it comes from:

- Li et al., "Beyond Log Likelihood" (arXiv 2510.00526), compare objectives over models that know much or
  little of a task before they are trained. Where they know much, -p, which is DFT's potential, beats the
  negative log-likelihood; where they know little, the latter wins; in between neither does. They go by the
  mean probability of the target tokens, as this rule does. The bounds 0.5 and 0.1 are ours: round numbers
  that lie between what they report of mathematics (strong) and of puzzles that models have never seen (weak).
- Wu et al. (arXiv 2508.05629) claim gains for mathematics and code with models of up to 7 billion parameters
  and, in their limitations and in the notes of their repository, no more than that.
- A token that the model holds for impossible gets next to no gradient (w * |gradient| = p * (1 - p)), so with
  a new chat template its end token is not learned: seen by users of the method (yongliang-wu/DFT issue 14),
  and cured by a floor under the weight, alpha < 1.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dft.errors import UserError
from dft.metrics import BINS
from dft.training.measuring.meter import short_names
from dft.training.measuring.nonfinite import origin_name
from dft.training.measuring.scoring import TokenTable

STRONG, WEAK = 0.5, 0.1
"""Mean p from which, and below which, the model's prior counts as strong and as weak."""
UNKNOWN_END = 0.1
"""Mean p of end-of-turn tokens below which the model does not know that turns end with them."""
SILENCED = 0.01
"""A token of a smaller p gets less than a hundredth of the gradient that SFT would give it."""
FLOOR_ALPHA = 0.9
"""With which every token keeps at least a tenth of it."""
SHOWN = 12
"""Kinds of silenced tokens that are listed."""


def preflight_report(
    table: TokenTable,
    files: Sequence[str],
    end_of_turn_ids: Sequence[int],
    shown_as: Callable[[int], str],
    model: str,
) -> dict[str, Any]:
    """What the model thinks of the data, as a whole and file by file, and what follows from it.

    Args:
        files: their names, as the table numbers them.
        end_of_turn_ids: tokens that end a turn.
        shown_as: a token as text.
        model: its name.

    Raises:
        UserError: probabilities that are not numbers.
    """
    if len(broken := np.flatnonzero(np.isnan(table.nll))):
        place = origin_name(int(table.file[broken[0]]), int(table.line[broken[0]]), files)
        raise UserError(
            f"--preflight True: {model} gives probabilities that are not numbers for {len(broken):,} of "
            f"{len(table):,} tokens, first in {place}; its weights may be broken"
        )

    def numbers(some: TokenTable) -> dict[str, Any]:
        return {**numbers_of(some, end_of_turn_ids), "silenced": silenced_of(some, shown_as)}

    names = short_names(list(files))
    known = [number for number in np.unique(table.file) if number >= 0]
    whole = numbers(table)
    of_files = {names[number]: numbers(table.select(table.file == number)) for number in known}
    return {
        "model": model,
        "whole": whole,
        "files": of_files,
        "thresholds": {"strong": STRONG, "weak": WEAK, "unknown_end": UNKNOWN_END, "silenced": SILENCED},
        "advice": advice(whole, of_files),
    }


def numbers_of(table: TokenTable, end_of_turn_ids: Sequence[int]) -> dict[str, Any]:
    """Means over the tokens of a table.

    Returns:
        `gradient_kept`: what DFT (alpha = 1) keeps of SFT's gradient, sum(w * |g|) / sum(|g|) with the
        1-norm of the gradient on the logits, |softmax - onehot| = 2 * (1 - p). `silenced_share`: of tokens
        with p below `SILENCED`. `p_histogram`: counts in equal parts of [0, 1].
    """
    p = table.p_correct
    gradient = 2 * (1 - p)
    ends = np.isin(table.target, list(end_of_turn_ids))
    counts, _ = np.histogram(p, bins=BINS, range=(0, 1))
    total = gradient.sum()
    return {
        "tokens": len(table),
        "avg_p_correct": float(p.mean()),
        "nll": float(table.nll.mean()),
        "entropy": float(table.entropy.mean()),
        "acc": float(table.correct.mean()),
        "p_end_of_turn": float(p[ends].mean()) if ends.any() else None,
        "gradient_kept": float((p * gradient).sum() / total) if total else 1.0,
        "silenced_share": float((p < SILENCED).mean()),
        "p_histogram": counts.tolist(),
    }


def silenced_of(table: TokenTable, shown_as: Callable[[int], str]) -> list[dict[str, Any]]:
    """The kinds of tokens that most often have p below `SILENCED`, and how often they occur at all."""
    silenced = Counter(table.target[table.p_correct < SILENCED].tolist())
    occurring = Counter(table.target.tolist())
    return [
        {"token": token, "shown": repr(shown_as(token)), "silenced": number, "of": occurring[token]}
        for token, number in silenced.most_common(SHOWN)
    ]


def advice(whole: dict[str, Any], files: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Recommendations, the most important first, each with its evidence."""
    given = [prior(whole)]
    if (end := ending(whole)) is not None:
        given.append(end)
    kinds = {name: kind_of(numbers["avg_p_correct"]) for name, numbers in files.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(
            f"{name} {files[name]['avg_p_correct']:.2f} ({kind} prior)" for name, kind in kinds.items()
        )
        given.append(
            {
                "recommendation": "the files differ: consider training them apart, or in two stages",
                "evidence": f"mean p: {told}",
                "source": "arXiv 2510.00526",
            }
        )
    return given


def kind_of(mean: float) -> str:
    if mean > STRONG:
        return "strong"
    return "weak" if mean < WEAK else "middling"


def prior(numbers: dict[str, Any]) -> dict[str, str]:
    """What the mean probability of the targets says."""
    mean, kept = numbers["avg_p_correct"], numbers["gradient_kept"]
    evidence = (
        f"mean p of the right token {mean:.3f}; DFT keeps {100 * kept:.1f} % of SFT's gradient; "
        f"{100 * numbers['silenced_share']:.1f} % of the tokens have p < {SILENCED:g}"
    )
    kind = kind_of(mean)
    if kind == "strong":
        text = (
            f"DFT fits (--dft_alpha 1): the prior is strong, mean p > {STRONG:g}. There, weighting by p "
            "protects what the model knows from the few targets that it holds for wrong"
        )
    elif kind == "weak":
        text = (
            f"SFT first (--dft_alpha 0), or SFT and then DFT: the prior is weak, mean p < {WEAK:g}. DFT "
            "would hardly move the tokens that have to be learned"
        )
    else:
        text = (
            f"no clear answer: mean p lies between {WEAK:g} and {STRONG:g}, where neither objective wins "
            f"throughout. Train with both (--dft_alpha 0 and 1, and {FLOOR_ALPHA:g} between them) and "
            "compare eval_acc and what you evaluate by, not eval_loss"
        )
    return {
        "recommendation": text,
        "evidence": evidence,
        "source": "arXiv 2510.00526; arXiv 2508.05629 claims mathematics and code, up to 7 B parameters",
    }


def ending(numbers: dict[str, Any]) -> dict[str, str] | None:
    """Advice where the model does not know the end-of-turn token; None where it does."""
    end = numbers["p_end_of_turn"]
    if end is None or end >= UNKNOWN_END:
        return None
    return {
        "recommendation": (
            f"put a floor under the weight: --end_of_turn_weight {1 - FLOOR_ALPHA:.1g}, or --dft_alpha "
            f"{FLOOR_ALPHA:g} or less, of which SFT is one. The model does not know "
            "that turns end with this token, and with alpha 1 a token of p near 0 gets no gradient, so it "
            f"would not learn to stop; with {FLOOR_ALPHA:g} every token keeps at least {1 - FLOOR_ALPHA:.0%}"
        ),
        "evidence": f"mean p of the end-of-turn tokens {end:.4f}, below {UNKNOWN_END:g}",
        "source": "w * |gradient| = p * (1 - p); yongliang-wu/DFT issue 14",
    }
