"""Select the cases of a parametrized test that the default run includes."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Sequence[Any]) -> list[Any]:
    """Mark all cases of a parametrized test as slow except the `quick` ones."""
    cases = list(cases)
    assert all(case in cases for case in quick)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow
        )
        for case in cases
    ]
