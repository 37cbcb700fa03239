"""Accuracies with their intervals. The unit is the problem: samples of one are not independent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Z = 1.959963984540054
"""Of the normal distribution, 95 % within."""
ROUNDING = 1e-9
"""By which differences of shares that are the same may differ as floats, and more."""


@dataclass(frozen=True)
class Share:
    """A share of [0, 1] and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def avg_at_n(right: Sequence[Sequence[bool]]) -> Share:
    """Mean accuracy of a sample.

    Wilson's interval (1927) for as many independent samples as have the variance that is found between
    problems: p (1 - p) / n_eff = variance of the problems' means / problems, with t for z since that variance
    is an estimate. There are never more of them than samples. It stays within [0, 1], and is nearly the plain
    one of Wilson for one sample per problem.

    Where all samples are right, or none is, nothing is known of how problems differ: they count as one sample
    each.

    Args:
        right: for each problem, whether each of its samples is right.
    """
    means = [sum(samples) / len(samples) for samples in right]
    count, mean = len(means), sum(means) / len(means)
    if count == 1 or mean in (0, 1):
        return wilson(mean, count)
    total = sum(map(len, right))
    spread = t_quantile(count - 1) ** 2 * variance_of_mean(means)
    return wilson(mean, min(total, Z * Z * mean * (1 - mean) / spread) if spread > 0 else total)


def variance_of_mean(values: Sequence[float]) -> float:
    """Of at least two values: their variance / their number."""
    mean = sum(values) / len(values)
    return sum((one - mean) ** 2 for one in values) / (len(values) - 1) / len(values)


@lru_cache
def t_quantile(freedom: int) -> float:
    """The t that holds 95 % of Student's distribution between -t and t.

    By bisection of the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = Z, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if t_within(middle, freedom) > 0.95 else (middle, high)
    return high


def t_within(t: float, freedom: int) -> float:
    """The probability of lying between -t and t, with this many degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for step in range(2 + odd, freedom, 2):
        term *= (step - 1) / step * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def pass_at_n(right: Sequence[Sequence[bool]]) -> Share:
    """Share of problems of which at least one sample is right, with Wilson's interval."""
    solved = [any(samples) for samples in right]
    return wilson(sum(solved) / len(solved), len(solved))


def wilson(share: float, count: float) -> Share:
    """Wilson's score interval of a share among so many independent ones (E. B. Wilson, 1927)."""
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Share(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def difference(right: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]) -> Share:
    """How much more of the samples are right than of another model's, on the same problems.

    The interval is that of the mean of paired differences by Student's distribution, cut off at -1 and 1.
    Where all of them are the same, which tells nothing of their variance, it is Newcombe's hybrid score
    interval (1998, method 10) of the two shares.
    """
    gaps = [sum(one) / len(one) - sum(two) / len(two) for one, two in zip(right, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    if max(gaps) - min(gaps) > ROUNDING:
        below = above = t_quantile(len(gaps) - 1) * math.sqrt(variance_of_mean(gaps))
    else:
        one, two = avg_at_n(right), avg_at_n(other)
        below = math.hypot(one.value - one.low, two.high - two.value)
        above = math.hypot(one.high - one.value, two.value - two.low)
    return Share(mean, max(-1.0, mean - below), min(1.0, mean + above))
