"""Intervals against figures worked out elsewhere, and against how often they hold the truth."""

import math
import random

import pytest

from dft.evaluation.statistics import avg_at_n, difference, pass_at_n, wilson


def test_wilsons_interval():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3); 0 of 20: 0 to 0.1611."""
    found = wilson(81 / 263, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    found = wilson(0, 20)
    assert found.low == 0 and found.high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(1, 20).high == 1


def test_one_sample_each_is_nearly_wilson():
    right = [[True]] * 30 + [[False]] * 70
    found, plain = avg_at_n(right), wilson(0.3, 99)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, plain.low, plain.high))
    assert pass_at_n(right).value == 0.3


def test_samples_of_a_problem_are_not_independent():
    """Where all samples of a problem agree, more of them tell no more."""
    once = [[index < 3] for index in range(10)]
    often = [[index < 3] * 16 for index in range(10)]
    assert avg_at_n(once) == avg_at_n(often)
    mixed = [[True, False] * 8 for _ in range(10)]
    assert avg_at_n(mixed).value == 0.5 and pass_at_n(mixed).value == 1


@pytest.mark.parametrize("count", [20, 100])
def test_the_interval_holds_the_truth_as_often_as_it_says(count):
    """Problems of different difficulty, p from Beta(1, 3) with mean 1/4, eight samples each."""
    generator, held, trials = random.Random(count), 0, 800
    for _ in range(trials):
        right = []
        for _ in range(count):
            p = generator.betavariate(1, 3)
            right.append([generator.random() < p for _ in range(8)])
        found = avg_at_n(right)
        held += found.low <= 0.25 <= found.high
    assert 0.92 <= held / trials <= 0.98


def test_differences_are_paired():
    one = [[True, False], [True, True], [False, False], [True, True]]
    two = [[False, False], [True, False], [False, False], [True, False]]
    gaps = [0.5, 0.5, 0.0, 0.5]
    mean = sum(gaps) / 4
    half = 1.959964 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 3 / 4)
    found = difference(one, two)
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert difference(one, one).value == 0
