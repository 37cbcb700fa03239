"""Accuracies with their intervals. The unit is the problem: samples of one are not independent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054
"""Of the normal distribution, 95 % within."""


@dataclass(frozen=True)
class Share:
    """A share of [0, 1] and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def avg_at_n(right: Sequence[Sequence[bool]]) -> Share:
    """Mean accuracy of a sample.

    Wilson's interval (1927) for as many independent samples as have the variance that is found between
    problems: p (1 - p) / n_eff = variance of the problems' means / problems. It stays within [0, 1], and is
    the plain one of Wilson for one sample per problem, but for a factor (m - 1) / m.

    Args:
        right: for each problem, whether each of its samples is right.
    """
    means = [sum(samples) / len(samples) for samples in right]
    count, mean = len(means), sum(means) / len(means)
    variance = sum((one - mean) ** 2 for one in means) / (count - 1) / count if count > 1 else 0.0
    effective = mean * (1 - mean) / variance if variance > 0 else float(count)
    return wilson(mean, effective)


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

    The interval is that of the mean of paired differences, by the normal distribution, cut off at -1 and 1.
    """
    gaps = [sum(one) / len(one) - sum(two) / len(two) for one, two in zip(right, other, strict=True)]
    count, mean = len(gaps), sum(gaps) / len(gaps)
    variance = sum((one - mean) ** 2 for one in gaps) / (count - 1) / count if count > 1 else 1.0
    half = Z * math.sqrt(variance)
    return Share(mean, max(-1.0, mean - half), min(1.0, mean + half))
