"""Application of the rules of a file to its rows: conditions, ignored and renamed columns, names of roles."""

from collections.abc import Iterable
from typing import Any

from dft.data.conversations.column_meanings import MEANING_OF
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_json import parse_list
from dft.data.conversations.row_rules import RowLeftOut, RowRules, TurnNames
from dft.data.conversations.row_weight import WEIGHT_COLUMNS

Row = dict[str, Any]


def apply_rules(row: Row, rules: RowRules) -> tuple[Row, tuple[str, ...]]:
    """Return a row with its columns filtered and renamed, and the columns that are left out.

    Raises:
        RowLeftOut: the row does not fulfil a condition of `rules.kept`.
        BadLine: a column of a condition is missing, or two columns have the same name.
    """
    _check_conditions(row, rules)
    name_of = {column: name for name, column in rules.columns}
    result: Row = {}
    left_out: list[str] = []
    for column, value in row.items():
        if _is_left_out(column, rules):
            left_out.append(column)
            continue
        name = name_of.get(column, column)
        if name in result:
            raise BadLine(
                f"--columns {name}={dict(rules.columns)[name]}: the row also has a column '{name}'; leave it "
                f"out with --ignore_columns {name}",
                "--columns gives a name that another column has",
            )
        result[name] = value
    if rules.turns is not None:
        for name in ("conversations", "chosen", "rejected"):
            if name in result:
                result[name] = _rename_turns(parse_list(f"'{name}'", result[name]), rules.turns)
    return result, tuple(left_out)


def renamed_columns(columns: Iterable[str], rules: RowRules) -> list[str]:
    """Return the names that the columns of a table have after `apply_rules`, without those left out."""
    name_of = {column: name for name, column in rules.columns}
    return [name_of.get(column, column) for column in columns if not _is_left_out(column, rules)]


def _is_left_out(column: str, rules: RowRules) -> bool:
    if column in rules.ignored:
        return True
    if not rules.mapped_only or column in MEANING_OF or column in WEIGHT_COLUMNS:
        return False
    return all(column != source for _, source in rules.columns)


def _check_conditions(row: Row, rules: RowRules) -> None:
    for column, values in rules.kept:
        condition = f"{column}={','.join(values)}"
        if column not in row:
            raise BadLine(
                f"--keep_rows {condition}: the row has no '{column}'; name the file that the condition is "
                f"for, like --keep_rows FILE:{condition}",
                "a column of --keep_rows is missing",
            )
        if not any(_equals(row[column], value) for value in values):
            raise RowLeftOut(f"--keep_rows {condition}")


def _equals(value: Any, text: str) -> bool:
    """Return whether a value of a row equals a value of a flag: true is "true", and 1 is "1" and "1.0"."""
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, int | float):
        try:
            return float(text) == value
        except ValueError:
            return False
    return isinstance(value, str) and (value == text or value.lower() == text.lower() in ("true", "false"))


def _rename_turns(turns: Any, names: TurnNames) -> Any:
    if isinstance(turns, list):
        return [_rename_turns(turn, names) for turn in turns]
    if not isinstance(turns, dict) or names.role_key not in turns:
        return turns
    turn = {key: value for key, value in turns.items() if key not in (names.role_key, names.text_key)}
    role = turns[names.role_key]
    turn["from"] = dict(names.roles).get(role, role) if isinstance(role, str) else role
    if names.text_key in turns:
        turn["value"] = turns[names.text_key]
    return turn
