"""Select the cases of a parametrized test that the default run includes."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Sequence[Any]) -> list[Any]:
    """Mark all cases of a parametrized test as slow except the `quick` ones."""
    cases = list(cases)
    assert all(one in cases for one in quick)
    return [
        pytest.param(
            *(one if isinstance(one, tuple) else (one,)), marks=() if one in quick else pytest.mark.slow
        )
        for one in cases
    ]
