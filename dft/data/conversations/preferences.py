"""Preference pairs as conversations: the chosen answer is supervised, the rejected one is dropped."""

from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_json import parse_list
from dft.data.conversations.turn_styles import is_answer, role_of
from dft.data.conversations.turns import SWITCHES, WEIGHTS
from dft.strict_json import json_type_name

Row = dict[str, Any]
SUPERVISION_KEYS = (*SWITCHES, *WEIGHTS)
CHOSEN = ("chosen", "chosen_messages", "preferred_output")
REJECTED = ("rejected", "rejected_messages", "rejected_response", "non_preferred_output")
LISTS = ("messages", "conversations", "conversation")
"""Columns that hold the turns before the answer."""
ANSWERS = {"instruction": "output", "query": "response", "prompt": "completion"}
"""Column of the answer by the column of its question."""


def take_chosen(row: Row) -> tuple[Row, bool]:
    """Return a row in which only the chosen answer of a preference pair is supervised.

    Returns:
        The row without the columns of the pair, with the chosen answer as the end of its conversation; and
        whether of this conversation only the last turn is to be supervised.

    Raises:
        BadLine: the chosen answer cannot be joined to the other columns.
    """
    pair = {key: row[key] for key in (*CHOSEN, *REJECTED) if key in row}
    if not pair:
        return row, False
    if isinstance(
        row.get("input"), dict
    ):  # OpenAI's format: the conversation before the answers, and its tools
        row = {**row["input"], **{key: value for key, value in row.items() if key != "input"}}
    others = {key: value for key, value in row.items() if key not in pair}
    key = next((key for key in CHOSEN if key in pair), None)
    if several := [other for other in CHOSEN if other != key and pair.get(other)]:
        raise BadLine(
            f"'{key}' and '{several[0]}' both hold a chosen answer; leave one out with --ignore_columns",
            "two chosen answers",
        )
    if key is None:
        if "rejected" not in pair:  # ms-swift keeps the chosen answer in the conversation itself
            return others, True
        kind = "a preference pair without 'chosen'"
        raise BadLine(f"{kind}, so there is no answer to train on", kind)
    chosen = parse_list(f"'{key}'", pair[key])
    if isinstance(chosen, list) and chosen and not _begins_with_answer(chosen):
        lists = [pair[name] for name in REJECTED if isinstance(pair.get(name), list)]
        rejected: list[Any] = lists[0] if lists else []
        return _whole_conversation(others, chosen, rejected), not rejected
    return _continued(others, key, chosen)


def _begins_with_answer(turns: list[Any]) -> bool:
    return isinstance(turns[0], dict) and is_answer(turns[0])


def _whole_conversation(row: Row, turns: list[Any], rejected: list[Any]) -> Row:
    """Return a row with these turns, of which those that the rejected conversation shares are context."""
    for name in (*LISTS, "prompt"):
        if name in row:
            _check_contained(name, parse_list(f"'{name}'", row[name]), turns)
    others = {name: value for name, value in row.items() if name not in (*LISTS, "prompt")}
    pairs = list(zip(turns, rejected, strict=False))
    shared = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return {**others, "messages": [*map(_as_context, turns[:shared]), *turns[shared:]]}


def _check_contained(name: str, context: Any, turns: list[Any]) -> None:
    """Check that the turns, or the text, in a column are part of the conversation with the chosen answer."""
    if isinstance(context, list):
        is_contained = [_role_and_text(turn) for turn in context] == [
            _role_and_text(turn) for turn in turns[: len(context)]
        ]
    else:
        is_contained = context in [_role_and_text(turn)[1] for turn in turns]
    if not is_contained:
        raise BadLine(
            f"'{name}' is not part of the chosen conversation, which has all turns; --ignore_columns {name} "
            "leaves it out",
            f"'{name}' beside a whole chosen conversation",
        )


def _role_and_text(turn: Any) -> tuple[Any, Any]:
    if not isinstance(turn, dict):
        return None, turn
    return role_of(turn), turn.get("content", turn.get("value"))


def _check_unanswered(name: str, turns: list[Any]) -> None:
    """Check that the turns before the chosen answer do not end with an answer."""
    if turns and isinstance(turns[-1], dict) and is_answer(turns[-1]):
        raise BadLine(
            f"'{name}' ends with an answer, so the chosen one cannot follow it; leave one of them out, "
            "with --ignore_columns",
            "a chosen answer after an answer",
        )


def _continued(row: Row, key: str, chosen: Any) -> tuple[Row, bool]:
    """Return a row with the chosen answer, a text or turns, after the turns or the question of the row."""
    context = next((name for name in LISTS if name in row), None)
    if context is None and isinstance(row.get("prompt"), list):
        row, context = {**row, "messages": row["prompt"]}, "messages"
        del row["prompt"]
    if context is not None:
        turns = parse_list(f"'{context}'", row[context])
        answer = {"role": "assistant", "content": chosen} if isinstance(chosen, str) else chosen
        if isinstance(turns, list) and isinstance(answer, dict | list):
            _check_unanswered(context, turns)
            answers = answer if isinstance(answer, list) else [answer]
            return {**row, context: [*map(_as_context, turns), *answers]}, False
    question = next((name for name in ANSWERS if name in row), None)
    if context is None and question is not None:
        if row.get(ANSWERS[question], chosen) not in ("", chosen):
            raise BadLine(
                f"'{ANSWERS[question]}' and '{key}' are different answers; --ignore_columns "
                f"{ANSWERS[question]} leaves the first one out",
                "two chosen answers",
            )
        if isinstance(chosen, str):
            return {**row, ANSWERS[question]: chosen}, True
        if question == "prompt" and isinstance(chosen, list | dict):
            others = {name: value for name, value in row.items() if name != "prompt"}
            answers = chosen if isinstance(chosen, list) else [chosen]
            return {**others, "messages": [{"role": "user", "content": row["prompt"]}, *answers]}, False
    raise BadLine(
        f"'{key}' is {json_type_name(chosen)} that cannot be joined to the other columns; expected a text or "
        f"turns that follow {', '.join((*LISTS, *ANSWERS))}, or a list of all turns",
        f"wrong '{key}'",
    )


def _as_context(turn: Any) -> Any:
    """Return a turn that is not supervised."""
    if not (isinstance(turn, dict) and is_answer(turn)):
        return turn
    return {**{key: value for key, value in turn.items() if key not in SUPERVISION_KEYS}, "train": False}
