"""Running sums are exact where float32 stops counting, even on devices without float64."""

import math

import pytest
import torch

from dft.training.measuring.accumulator import Accumulator, accumulation_dtype

CPU = torch.device("cpu")


def test_only_devices_without_float64_accumulate_in_float32():
    assert accumulation_dtype(torch.device("mps")) == torch.float32
    for name in ("cpu", "cuda", "xpu"):
        assert accumulation_dtype(torch.device(name)) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_exact_beyond_the_range_of_float32(dtype):
    sums = Accumulator(2, CPU, dtype)
    sums.add_total(torch.tensor([2.0**24, 2.0**40], dtype=torch.float64))
    for _ in range(1000):
        sums.add(torch.tensor([1.0, 3.0]))
    assert sums.total().tolist() == [2.0**24 + 1000, 2.0**40 + 3000]
    assert torch.tensor(2.0**24) + 1 == 2.0**24  # a plain float32 sum


def test_float32_pairs_have_the_accuracy_of_float64():
    """Add 2**14 sums of 2**12 terms to a sum of 2**26 such terms."""
    generator = torch.Generator().manual_seed(0)
    lanes, additions = 2**14, 2**12
    pair, expected = Accumulator(lanes, CPU, torch.float32), Accumulator(lanes, CPU)
    plain = torch.full((lanes,), 2.0**25)
    for sums in (pair, expected):
        sums.add_total(torch.full((lanes,), 2.0**25, dtype=torch.float64))
    for _ in range(additions):
        terms = torch.rand(lanes, generator=generator)
        pair.add(terms)
        expected.add(terms)
        plain += terms
    assert ((pair.total() - expected.total()).abs() / expected.total()).max() < 1e-12
    assert (plain.double() - expected.total()).abs().min() > 1000


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_nonfinite_sum_persists_without_affecting_the_others(value):
    sums = Accumulator(2, CPU, torch.float32)
    for _ in range(3):
        sums.add(torch.tensor([value, 1.0]))
    bad, good = sums.total().tolist()
    assert (math.isnan(bad) if math.isnan(value) else bad == value) and good == 3
    restored = Accumulator(2, CPU, torch.float32)
    restored.add_total(sums.total())
    assert restored.total()[1] == 3 and str(restored.total()[0].item()) == str(bad)


def test_a_copy_of_the_state_restores_the_sums():
    sums = Accumulator(1, CPU, torch.float32)
    sums.add(torch.tensor([0.1]))
    state = sums.state.clone()
    sums.add(torch.tensor([0.1]))
    sums.state.copy_(state)
    assert sums.total().item() == pytest.approx(0.1)
