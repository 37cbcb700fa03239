"""Parse a row of a test under some rules for its columns."""

import json

import pytest

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import RowRules


def parse(row: dict[str, object], **rules: object) -> Conversation:
    return parse_conversation(json.dumps(row).encode(), RowRules(**rules))


def error_of(row: dict[str, object], **rules: object) -> str:
    with pytest.raises(BadLine) as caught:
        parse(row, **rules)
    return str(caught.value)
