"""Valid ranges of numeric flags."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from dft.bounds import Bounds, check_bounds
from dft.errors import UserError


@dataclass
class Flags:
    length: Annotated[int, Bounds(minimum=2, maximum=1000, reason="because of a reason")] = 8
    share: Annotated[float | None, Bounds(above=0, below=1)] = None
    weights: Annotated[list[float], Bounds(above=0)] = field(default_factory=list)
    free: float = -math.inf


@pytest.mark.parametrize(
    "values", [{}, {"length": 2}, {"length": 1000}, {"share": 0.5}, {"weights": [1, 0.1]}]
)
def test_values_in_range_are_accepted(values):
    check_bounds(Flags(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 1}, "--length 1: must be at least 2, because of a reason"),
        ({"length": 10**400}, f"--length 1{400 * '0'}: must be at most 1,000"),
        ({"length": 1001}, "--length 1001: must be at most 1,000"),
        ({"share": 0.0}, "--share 0: must be greater than 0"),
        ({"share": 1.0}, "--share 1: must be less than 1"),
        ({"share": math.nan}, "--share nan: must be a finite number"),
        ({"weights": [1.0, 0.0]}, "--weights 1 0: each value must be greater than 0"),
        ({"weights": [math.inf]}, "--weights inf: each value must be a finite number"),
    ],
)
def test_the_message_names_flag_value_and_bound(values, message):
    with pytest.raises(UserError) as caught:
        check_bounds(Flags(**values))
    assert str(caught.value) == message


def test_bounds_of_inherited_fields_are_checked():
    with pytest.raises(UserError, match="--free -inf: must be a finite number"):
        check_bounds(Flags(), {"free": Bounds(minimum=0)})
