"""Accuracies with confidence intervals. Samples of the same problem are not independent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

NORMAL_QUANTILE = 1.959963984540054
"""The z for which 95 % of the standard normal distribution is between -z and z."""
ROUNDING = 1e-9
"""Differences between equal shares may differ by up to this much because of rounding."""


@dataclass(frozen=True)
class Share:
    """A share, or a difference of shares, with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def avg_at_n(grades: Sequence[Sequence[bool]]) -> Share:
    """Return the mean accuracy of a sample, with its interval.

    The interval is Wilson's (1927) for the number of independent samples that would have the observed
    variance between problems: p (1 - p) / n_eff = variance of the problems' means / number of problems, with
    Student's t in place of z because that variance is an estimate. n_eff is at most the number of samples.
    The interval stays within [0, 1], and is nearly Wilson's own for one sample per problem.

    If all samples are correct or all are wrong, the variance between problems is unknown, and each problem
    counts as one sample.

    Args:
        grades: for each problem, whether each of its samples is correct.
    """
    means = [sum(samples) / len(samples) for samples in grades]
    count, mean = len(means), sum(means) / len(means)
    if count == 1 or mean in (0, 1):
        return wilson(mean, count)
    total = sum(map(len, grades))
    spread = t_quantile(count - 1) ** 2 * variance_of_mean(means)
    independent = NORMAL_QUANTILE**2 * mean * (1 - mean) / spread if spread > 0 else total
    return wilson(mean, min(total, independent))


def variance_of_mean(values: Sequence[float]) -> float:
    """Return the variance of the mean of at least two values: their variance / their number."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


@lru_cache
def t_quantile(freedom: int) -> float:
    """Return the t for which 95 % of Student's distribution is between -t and t.

    Bisects the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        freedom: number of degrees of freedom, at least 1.
    """
    low, high = NORMAL_QUANTILE, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if t_within(middle, freedom) > 0.95 else (middle, high)
    return high


def t_within(t: float, freedom: int) -> float:
    """Return the probability that Student's distribution assigns to the interval from -t to t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for step in range(2 + odd, freedom, 2):
        term *= (step - 1) / step * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def pass_at_n(grades: Sequence[Sequence[bool]]) -> Share:
    """Return the share of problems with at least one correct sample, with Wilson's interval."""
    solved = [any(samples) for samples in grades]
    return wilson(sum(solved) / len(solved), len(solved))


def wilson(share: float, count: float) -> Share:
    """Return Wilson's score interval of a share of `count` independent samples (E. B. Wilson, 1927)."""
    z = NORMAL_QUANTILE
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Share(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def difference(grades: Sequence[Sequence[bool]], baseline: Sequence[Sequence[bool]]) -> Share:
    """Return the difference in accuracy to another model on the same problems.

    The interval is Student's interval for the mean of paired differences, limited to [-1, 1]. If
    all differences are equal, their variance is unknown, and the interval is Newcombe's hybrid score interval
    of the two shares (1998, method 10).
    """
    gaps = [
        sum(own) / len(own) - sum(other) / len(other) for own, other in zip(grades, baseline, strict=True)
    ]
    mean = sum(gaps) / len(gaps)
    if max(gaps) - min(gaps) > ROUNDING:
        below = above = t_quantile(len(gaps) - 1) * math.sqrt(variance_of_mean(gaps))
    else:
        own_share, other_share = avg_at_n(grades), avg_at_n(baseline)
        below = math.hypot(own_share.value - own_share.low, other_share.high - other_share.value)
        above = math.hypot(own_share.high - own_share.value, other_share.value - other_share.low)
    return Share(mean, max(-1.0, mean - below), min(1.0, mean + above))
