"""Advice on whether DFT fits the data, from the probabilities that the model gives it before training.

Sources of the rule:

- Li et al., "Beyond Log Likelihood" (arXiv 2510.00526), compare objectives on models with strong and weak
  priors, that is, models that know much or little about a task before they are trained on it. With a strong
  prior, -p (the potential of DFT) is better than the negative log-likelihood; with a weak prior, the negative
  log-likelihood is better; in between, neither is. They measure the prior by the mean probability of the
  target tokens, and so does this rule. The bounds 0.5 and 0.1 are ours: round numbers between the values they
  report for mathematics (strong) and for puzzles that are new to the models (weak).
- Wu et al. (arXiv 2508.05629) claim gains for mathematics and code with models of up to 7 billion parameters.
  Their limitations and the notes of their repository claim no more than that.
- A token that the model considers impossible gets almost no gradient (w * |gradient| = p * (1 - p)). With a
  new chat template, the end-of-turn token is therefore not learned. Users of the method have reported this
  (yongliang-wu/DFT issue 14); a floor on the weight, alpha < 1, solves it.
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
"""The prior is strong if mean p is above the first value, and weak if it is below the second."""
UNKNOWN_END = 0.1
"""Below this mean p of the end-of-turn tokens, the model does not know that they end a turn."""
SILENCED = 0.01
"""A token with a smaller p gets less than a hundredth of the gradient it would get from SFT."""
FLOOR_ALPHA = 0.9
"""With this alpha, each token keeps at least a tenth of the SFT gradient."""
MIXED_ALPHA = 0.5
"""The mixture of DFT and SFT with the highest mean accuracy in our studies, see docs/objectives.md."""
MAX_LISTED = 12
"""Number of different silenced tokens that are listed."""


def preflight_report(
    table: TokenTable,
    files: Sequence[str],
    end_of_turn_ids: Sequence[int],
    decode: Callable[[int], str],
    model: str,
) -> dict[str, Any]:
    """Return statistics of the scored tokens, in total and per file, and the advice that follows from them.

    Args:
        table: the scored tokens.
        files: file names; `table.file` holds indices into them.
        end_of_turn_ids: token ids that end a turn.
        decode: returns the text of a token id.
        model: name of the model.

    Raises:
        UserError: some probabilities are NaN.
    """
    if len(nan_rows := np.flatnonzero(np.isnan(table.nll))):
        origin = origin_name(int(table.file[nan_rows[0]]), int(table.line[nan_rows[0]]), files)
        raise UserError(
            f"--preflight True: {model} gives NaN probabilities for {len(nan_rows):,} of {len(table):,} "
            f"tokens, first in {origin}; its weights may be broken"
        )

    def statistics(part: TokenTable) -> dict[str, Any]:
        return {**token_statistics(part, end_of_turn_ids), "silenced": silenced_tokens(part, decode)}

    names = short_names(list(files))
    whole = statistics(table)
    per_file = {
        names[index]: statistics(table.select(table.file == index))
        for index in np.unique(table.file)
        if index >= 0
    }
    return {
        "model": model,
        "whole": whole,
        "files": per_file,
        "thresholds": {"strong": STRONG, "weak": WEAK, "unknown_end": UNKNOWN_END, "silenced": SILENCED},
        "advice": advice(whole, per_file),
    }


def token_statistics(table: TokenTable, end_of_turn_ids: Sequence[int]) -> dict[str, Any]:
    """Return means over the tokens of a table.

    Returns:
        Among others, `gradient_kept`: the share of the SFT gradient that DFT (alpha = 1) keeps, which is
        sum(w * |g|) / sum(|g|), where |g| = |softmax - onehot| = 2 * (1 - p) is the 1-norm of the gradient on
        the logits; `silenced_share`: the share of tokens with p below `SILENCED`; `p_histogram`: counts in
        `BINS` equal parts of [0, 1].
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


def silenced_tokens(table: TokenTable, decode: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the tokens that most often have p below `SILENCED`, with their total counts."""
    silenced = Counter(table.target[table.p_correct < SILENCED].tolist())
    occurrences = Counter(table.target.tolist())
    return [
        {"token": token, "shown": repr(decode(token)), "silenced": count, "of": occurrences[token]}
        for token, count in silenced.most_common(MAX_LISTED)
    ]


def advice(whole: dict[str, Any], files: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return recommendations with their evidence and source, the most important first.

    Args:
        whole: `token_statistics` of all tokens.
        files: the same for each file.
    """
    recommendations = [prior_advice(whole)]
    if (end_advice := end_of_turn_advice(whole)) is not None:
        recommendations.append(end_advice)
    priors = {name: prior_of(statistics["avg_p_correct"]) for name, statistics in files.items()}
    if len(set(priors.values())) > 1:
        means = ", ".join(
            f"{name} {files[name]['avg_p_correct']:.2f} ({prior} prior)" for name, prior in priors.items()
        )
        recommendations.append(
            {
                "recommendation": "the files differ: consider training on them separately, or in two stages",
                "evidence": f"mean p: {means}",
                "source": "arXiv 2510.00526",
            }
        )
    return recommendations


def prior_of(mean: float) -> str:
    """Classify a prior as "strong", "medium" or "weak"."""
    if mean > STRONG:
        return "strong"
    return "weak" if mean < WEAK else "medium"


def prior_advice(statistics: dict[str, Any]) -> dict[str, str]:
    """Return the objective that the mean probability of the targets suggests."""
    mean, gradient_kept = statistics["avg_p_correct"], statistics["gradient_kept"]
    prior = prior_of(mean)
    if prior == "strong":
        text = (
            f"DFT fits (--dft_alpha 1): the prior is strong, mean p > {STRONG:g}. Weighting by p then "
            "protects what the model knows from the few targets that it considers wrong"
        )
    elif prior == "weak":
        text = (
            f"SFT first (--dft_alpha 0), possibly followed by DFT: the prior is weak, mean p < {WEAK:g}. DFT "
            "would barely train the tokens that have to be learned"
        )
    else:
        text = (
            f"no clear answer: mean p is between {WEAK:g} and {STRONG:g}, where neither objective is always "
            f"better. Train with both (--dft_alpha 0 and 1, and {MIXED_ALPHA:g} between them), and compare "
            "eval_acc and your own evaluation, not eval_loss"
        )
    return {
        "recommendation": text,
        "evidence": (
            f"mean p of the target tokens is {mean:.3f}; "
            f"DFT keeps {100 * gradient_kept:.1f} % of the SFT gradient; "
            f"{100 * statistics['silenced_share']:.1f} % of the tokens have p < {SILENCED:g}"
        ),
        "source": (
            "arXiv 2510.00526; arXiv 2508.05629, which claims gains for mathematics and code with models of "
            "up to 7 B parameters"
        ),
    }


def end_of_turn_advice(statistics: dict[str, Any]) -> dict[str, str] | None:
    """Return advice if the model does not know the end-of-turn token; otherwise None."""
    mean = statistics["p_end_of_turn"]
    if mean is None or mean >= UNKNOWN_END:
        return None
    return {
        "recommendation": (
            f"set a floor on the token weight: --end_of_turn_weight {1 - FLOOR_ALPHA:.1g}, or --dft_alpha "
            f"{FLOOR_ALPHA:g} or less. The model does not know that turns end with this token. With alpha 1 "
            "a token with p near 0 gets no gradient, so the model would not learn to stop; with alpha "
            f"{FLOOR_ALPHA:g} each token keeps at least {1 - FLOOR_ALPHA:.0%} of the SFT gradient"
        ),
        "evidence": f"mean p of the end-of-turn tokens is {mean:.4f}, below {UNKNOWN_END:g}",
        "source": "w * |gradient| = p * (1 - p); yongliang-wu/DFT issue 14",
    }
