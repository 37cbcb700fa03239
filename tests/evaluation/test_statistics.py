"""Intervals against published values, and their coverage in simulations."""

import math
import random

import pytest

from dft.evaluation.statistics import avg_at_n, difference, pass_at_n, t_quantile, wilson


def test_wilson_interval_equals_published_values():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3); 0 of 20: 0 to 0.1611."""
    share = wilson(81 / 263, 263)
    assert (share.low, share.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    share = wilson(0, 20)
    assert share.low == 0 and share.high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(1, 20).high == 1


def test_t_quantiles_equal_published_values():
    """Values of a table for probability 0.975."""
    published = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 10: 2.2281, 29: 2.0452, 30: 2.0423, 120: 1.9799}
    for freedom, quantile in published.items():
        assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)
    assert t_quantile(5000) == pytest.approx(1.96044, abs=5e-5)


def test_one_sample_per_problem_is_nearly_wilson():
    grades = [[True]] * 30 + [[False]] * 70
    share, plain = avg_at_n(grades), wilson(0.3, 99 * (1.959964 / 1.984217) ** 2)
    assert (share.value, share.low, share.high) == pytest.approx((0.3, plain.low, plain.high), abs=1e-6)
    assert pass_at_n(grades).value == 0.3


def test_effective_sample_size_is_at_most_the_number_of_samples():
    """Problems of similar difficulty do not make the interval narrower than that of independent samples."""
    alike = [[True] * 8 + [False] * 8] * 10
    one_more = [*alike[1:], [True] * 9 + [False] * 7]
    assert avg_at_n(alike) == wilson(0.5, 160)
    assert avg_at_n(one_more) == wilson(81 / 160, 160)


def test_each_problem_counts_once_if_all_samples_agree():
    assert avg_at_n([[False] * 16] * 30) == wilson(0, 30)
    assert avg_at_n([[True] * 16] * 30) == wilson(1, 30)
    assert avg_at_n([[True, False]]) == wilson(0.5, 1)


def test_samples_of_a_problem_are_not_independent():
    """If all samples of a problem agree, additional samples do not change the interval."""
    once = [[index < 3] for index in range(10)]
    often = [[index < 3] * 16 for index in range(10)]
    assert avg_at_n(once) == avg_at_n(often)
    mixed = [[True, False] * 8 for _ in range(10)]
    assert avg_at_n(mixed).value == 0.5 and pass_at_n(mixed).value == 1


@pytest.mark.parametrize(
    ("count", "a", "b", "least"), [(20, 1, 3, 0.93), (100, 1, 3, 0.93), (30, 0.08, 1.84, 0.86)]
)
def test_coverage_of_the_interval(count, a, b, least):
    """Simulate problems of different difficulty: p from a Beta distribution, eight samples each.

    Coverage is lower for a few problems that are nearly all too hard, such as AIME: with 4 % of the grades
    right, almost no problem is ever solved.
    """
    generator, covered, trials = random.Random(count), 0, 800
    for _ in range(trials):
        grades = []
        for _ in range(count):
            p = generator.betavariate(a, b)
            grades.append([generator.random() < p for _ in range(8)])
        share = avg_at_n(grades)
        covered += share.low <= a / (a + b) <= share.high
    assert least <= covered / trials <= 0.98


def test_differences_are_paired():
    own = [[True, False], [True, True], [False, False], [True, True]]
    other = [[False, False], [True, False], [False, False], [True, False]]
    gaps = [0.5, 0.5, 0.0, 0.5]
    mean = sum(gaps) / 4
    half = 3.18244631 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 3 / 4)
    share = difference(own, other)
    assert (share.value, share.low, share.high) == pytest.approx((mean, mean - half, mean + half))


def test_equal_differences_have_an_interval():
    """Newcombe 1998, table II, method 10: 10/10 - 0/10 is 0.6075 to 1."""
    every, none = [[True]] * 10, [[False]] * 10
    share = difference(every, none)
    assert (share.value, share.low, share.high) == pytest.approx((1, 0.6075, 1), abs=5e-5)
    share = difference(none, none)
    assert share.value == 0 and -share.low == share.high == pytest.approx(0.2775, abs=5e-5)

    def tenths(count):
        return [True] * count + [False] * (10 - count)

    share = difference([tenths(3), tenths(2)], [tenths(1), tenths(0)])
    assert share.low < 0.1 and share.high > 0.3, "rounding errors are not a variance"
    share = difference([[True]], [[False]])
    assert share.low < 0.3 and share.high == 1
