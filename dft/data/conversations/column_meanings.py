"""The table of columns that change what a row means, although no row form reads them.

A row that has such a column must not be trained on as if it did not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.preferences import CHOSEN, REJECTED
from dft.data.conversations.row_rules import RowRules
from dft.data.conversations.turns import CORRECTNESS, LABELS, MEDIA, PARTIAL_KEYS, REWARDS, SWITCHES
from dft.strict_json import shorten

Row = dict[str, Any]
TRAIN_SPLIT = "train"
"""Beginning of the names of splits to train on, such as "train", "training" and "train_sft"."""
FALSE_TEXTS = ("false", "no", "0")
"""Texts that mean false in a column that says whether an answer is correct."""


@dataclass(frozen=True)
class ColumnMeaning:
    """Columns with a meaning, and what to do about them.

    Attributes:
        columns: names of the columns.
        kind: category that the error is counted under.
        matters: returns whether the value of such a column means anything, given the rules of the file.
        reason: returns what the value means and the remedy, given the column of the file, the name of it
            in this table, and its value.
    """

    columns: tuple[str, ...]
    kind: str
    matters: Callable[[Any, RowRules], bool]
    reason: Callable[[str, str, Any], str]


def _is_filled(value: Any, _: RowRules) -> bool:
    return value not in ("", "[]", "{}", [], {}, 0, False)  # the cells of .csv files are texts


def _always(_value: Any, _rules: RowRules) -> bool:
    return True


def _describe(value: Any) -> str:
    """Return a short description of a value in an error message."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else shorten(value)


def _is_false(value: Any, _: RowRules) -> bool:
    return value == 0 or (isinstance(value, str) and value.strip().lower() in FALSE_TEXTS)


def _is_switched_off(value: Any, _: RowRules) -> bool:
    # A number is hardly a switch: `loss` may be the loss of a row.
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _media(column: str, name: str, _: Any) -> str:
    return (
        f"'{column}' holds {MEDIA[name]}, and this trainer reads only text; --on_bad_data skip leaves such "
        f"rows out, --ignore_columns {column} trains on their text alone"
    )


def _judged(column: str, _: str, value: Any) -> str:
    good = "true" if isinstance(value, bool) else "VALUE"
    return (
        f"'{column}' is {_describe(value)}: it says whether an answer is good, and this trainer learns "
        f"every answer; --keep_rows {column}={good} trains on the good ones, --ignore_columns {column} on all"
    )


def _reward(column: str, _: str, value: Any) -> str:
    return (
        f"'{column}' is {_describe(value)}: it says how good an answer is, and this trainer learns "
        f"every answer; remove the bad ones and pass --ignore_columns {column}"
    )


def _pair(column: str, _name: str, _value: Any) -> str:
    return (
        f"'{column}' makes this a preference pair; --use_chosen True trains on the chosen answer, or "
        f"--ignore_columns leaves out the columns of the pair"
    )


def _switch(column: str, _: str, value: Any) -> str:
    return (
        f"'{column}' is {_describe(value)}, so the row is not to be trained on; --keep_rows {column}=true "
        f"leaves such rows out, --ignore_columns {column} trains on them"
    )


def _part(column: str, _name: str, _value: Any) -> str:
    return (
        f"'{column}' selects parts of a row, but only whole messages can be selected, with 'train' in the "
        f"message; --ignore_columns {column} trains on all answers"
    )


def _split(column: str, _: str, value: Any) -> str:
    return (
        f"'{column}' is {_describe(value)}, so the row belongs to another part of the data; "
        f"--keep_rows {column}=VALUE takes the rows of one part, --ignore_columns {column} takes all"
    )


def _is_other_split(value: Any, rules: RowRules) -> bool:
    is_train = isinstance(value, str) and value.lower().startswith(TRAIN_SPLIT)
    return is_train if rules.evaluation else not is_train


MEANINGS: tuple[ColumnMeaning, ...] = (
    ColumnMeaning(
        tuple(MEDIA),
        "images, videos or audio",
        _is_filled,
        _media,
    ),
    ColumnMeaning(LABELS, "an answer that is judged", _always, _judged),
    ColumnMeaning(CORRECTNESS, "an answer that is judged", _is_false, _judged),
    ColumnMeaning(REWARDS, "an answer with a reward", _always, _reward),
    ColumnMeaning(SWITCHES, "a row that is not to be trained on", _is_switched_off, _switch),
    ColumnMeaning(PARTIAL_KEYS, "a part of a row", _is_filled, _part),
    ColumnMeaning(
        (*CHOSEN, *REJECTED),
        "a preference pair",
        _is_filled,
        _pair,
    ),
    ColumnMeaning(("split",), "a row of another split", _is_other_split, _split),
)
"""Every column with a meaning. docs/data.md lists the same."""
MEANING_OF = {column: meaning for meaning in MEANINGS for column in meaning.columns}
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""Texts that stand for an image, a video or a recording in the turns of a row with such a column."""


def check_meanings(row: Row, rules: RowRules) -> None:
    """Check that no column changes the meaning of a row.

    A column that `--keep_rows` names has been dealt with.

    Raises:
        BadLine: there is such a column. The reason names it, its meaning and the flag to pass.
    """
    for name, value in row.items():
        meaning = MEANING_OF.get(name)
        if meaning is None:
            continue
        column = dict(rules.columns).get(name, name)
        if column in rules.kept_columns or not meaning.matters(value, rules):
            continue
        reason = meaning.reason(column, name, value)
        if name in MEDIA:
            text = json.dumps(row, default=str)
            marks = [mark for mark in PLACEHOLDERS if mark in text]
            reason += f", with {' and '.join(marks)} left in it" if marks else ""
        raise BadLine(reason, meaning.kind)
