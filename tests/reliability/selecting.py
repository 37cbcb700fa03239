"""Which of many similar cases the default run takes: all of them would last a quarter of an hour."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Sequence[Any]) -> list[Any]:
    """Cases of a parametrized test; those that are not `quick` are left to `pytest -m reliability`."""
    cases = list(cases)
    assert all(one in cases for one in quick)
    return [
        pytest.param(
            *(one if isinstance(one, tuple) else (one,)), marks=() if one in quick else pytest.mark.slow
        )
        for one in cases
    ]
