"""The weight of a whole row in the loss."""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import RowLeftOut
from dft.data.conversations.turns import Row, check_weight

WEIGHT_COLUMNS = ("weight", "loss_weight", "loss_scale", "sample_weight")
"""Columns with the weight of a row, which multiplies the weights of its turns."""
WEIGHT_0 = "weight 0"


def read_row_weight(row: Row) -> float:
    """Return the weight of a row without null columns, 1 if it has none.

    Raises:
        BadLine: the weight is not a number in range, or there are several that differ.
        RowLeftOut: the weight is 0.
    """
    weights: dict[str, float] = {}
    for column in WEIGHT_COLUMNS:
        if column in row:
            value = _parse_number(row[column])
            check_weight(f"'{column}'", column, value)
            weights[column] = float(value)
    if len({*weights.values()}) > 1:
        texts = [f"'{column}' is {value:g}" for column, value in weights.items()]
        raise BadLine(f"{' but '.join(texts)}; leave one out with --ignore_columns", "several weights")
    weight = next(iter(weights.values()), 1.0)
    if not weight:
        raise RowLeftOut(WEIGHT_0)
    return weight


def _parse_number(value: Any) -> Any:
    """Return the number in a text, as the cells of .csv files are texts; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
