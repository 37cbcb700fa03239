"""Texts and earlier turns in columns, shared by the row forms whose texts are columns."""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_json import parse_list
from dft.data.conversations.turns import Row, Turn, read_turn
from dft.strict_json import json_type_name

PAIR = "a pair of two strings, a question and its answer"


def read_history(row: Row) -> list[Turn]:
    """Return the turns of the `history` column: a list of pairs, each a question and its answer.

    Raises:
        BadLine: the column is not a list of pairs of strings, or one of them is empty.
    """
    pairs = parse_list("'history'", row.get("history", []))
    if pairs == "":
        return []
    if not isinstance(pairs, list):
        raise BadLine(
            f"'history' must be a list of pairs, got {json_type_name(pairs)}", "'history' is not a list"
        )
    turns = []
    for index, pair in enumerate(pairs):
        where = f"history[{index}]"
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadLine(f"{where} must be {PAIR}, got {json_type_name(pair)}", "wrong 'history'")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str):
                raise BadLine(f"{where} must be {PAIR}, got {json_type_name(text)}", "wrong 'history'")
            turns.append(read_turn(where, {"role": role, "content": text}))
    return turns


def read_text(row: Row, name: str) -> str:
    """Return the text in a column, "" if the row does not have it. Raises `BadLine` if it is no text."""
    value: Any = row.get(name, "")
    if not isinstance(value, str):
        raise BadLine(f"'{name}' must be a string, got {json_type_name(value)}", f"'{name}' is not a string")
    return value


def append_text(row: Row, question: str, answer_key: str, answer: str) -> Row | None:
    """Set the answer of a row with its question in a column, unless it has one; None without question."""
    if row.get(question) is None:
        return None
    return row if row.get(answer_key) is not None else {**row, answer_key: answer}
