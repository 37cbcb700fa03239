"""Intervals against figures worked out elsewhere, and against how often they hold the truth."""

import math
import random

import pytest

from dft.evaluation.statistics import avg_at_n, difference, pass_at_n, t_quantile, wilson


def test_wilsons_interval():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3); 0 of 20: 0 to 0.1611."""
    found = wilson(81 / 263, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    found = wilson(0, 20)
    assert found.low == 0 and found.high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(1, 20).high == 1


def test_quantiles_of_students_distribution():
    """Of printed tables (0.975)."""
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 10: 2.2281, 29: 2.0452, 30: 2.0423, 120: 1.9799}
    for freedom, quantile in known.items():
        assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)
    assert t_quantile(5000) == pytest.approx(1.96044, abs=5e-5)


def test_one_sample_each_is_nearly_wilson():
    right = [[True]] * 30 + [[False]] * 70
    found, plain = avg_at_n(right), wilson(0.3, 99 * (1.959964 / 1.984217) ** 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, plain.low, plain.high), abs=1e-6)
    assert pass_at_n(right).value == 0.3


def test_problems_that_are_alike_count_no_more_than_their_samples():
    """One more right answer of 160 hardly changes the interval, and makes it no narrower than theirs."""
    alike = [[True] * 8 + [False] * 8] * 10
    one_more = [*alike[1:], [True] * 9 + [False] * 7]
    assert avg_at_n(alike) == wilson(0.5, 160)
    assert avg_at_n(one_more) == wilson(81 / 160, 160)


def test_where_all_is_wrong_each_problem_counts_once():
    assert avg_at_n([[False] * 16] * 30) == wilson(0, 30)
    assert avg_at_n([[True] * 16] * 30) == wilson(1, 30)
    assert avg_at_n([[True, False]]) == wilson(0.5, 1)


def test_samples_of_a_problem_are_not_independent():
    """Where all samples of a problem agree, more of them tell no more."""
    once = [[index < 3] for index in range(10)]
    often = [[index < 3] * 16 for index in range(10)]
    assert avg_at_n(once) == avg_at_n(often)
    mixed = [[True, False] * 8 for _ in range(10)]
    assert avg_at_n(mixed).value == 0.5 and pass_at_n(mixed).value == 1


@pytest.mark.parametrize(
    ("count", "a", "b", "least"), [(20, 1, 3, 0.93), (100, 1, 3, 0.93), (30, 0.08, 1.84, 0.86)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(count, a, b, least):
    """Problems of different difficulty, p from a Beta distribution, eight samples each.

    Not where a few problems are nearly all too hard, as AIME is: with 4 % right, hardly one is solved.
    """
    generator, held, trials = random.Random(count), 0, 800
    for _ in range(trials):
        right = []
        for _ in range(count):
            p = generator.betavariate(a, b)
            right.append([generator.random() < p for _ in range(8)])
        found = avg_at_n(right)
        held += found.low <= a / (a + b) <= found.high
    assert least <= held / trials <= 0.98


def test_differences_are_paired():
    one = [[True, False], [True, True], [False, False], [True, True]]
    two = [[False, False], [True, False], [False, False], [True, False]]
    gaps = [0.5, 0.5, 0.0, 0.5]
    mean = sum(gaps) / 4
    half = 3.18244631 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 3 / 4)
    found = difference(one, two)
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))


def test_differences_that_are_all_the_same_have_an_interval():
    """Newcombe 1998, table II, method 10: 10/10 - 0/10 is 0.6075 to 1."""
    every, none = [[True]] * 10, [[False]] * 10
    found = difference(every, none)
    assert (found.value, found.low, found.high) == pytest.approx((1, 0.6075, 1), abs=5e-5)
    found = difference(none, none)
    assert found.value == 0 and -found.low == found.high == pytest.approx(0.2775, abs=5e-5)

    def tenths(count):
        return [True] * count + [False] * (10 - count)

    found = difference([tenths(3), tenths(2)], [tenths(1), tenths(0)])
    assert found.low < 0.1 and found.high > 0.3, "what rounding leaves is no variance"
    one = difference([[True]], [[False]])
    assert one.low < 0.3 and one.high == 1
