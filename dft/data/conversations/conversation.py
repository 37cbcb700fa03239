"""Parse the JSON text of a row into a validated conversation.

Errors give the reason. The caller adds the file and the line.
"""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from dft.data.conversations.column_meanings import check_meanings
from dft.data.conversations.column_rules import apply_rules
from dft.data.conversations.faults import BadLine
from dft.data.conversations.forms import describe_forms, find_form, no_form, unread_columns
from dft.data.conversations.preferences import take_chosen
from dft.data.conversations.row_json import parse_json, parse_json_string
from dft.data.conversations.row_rules import NO_RULES, RowRules
from dft.data.conversations.row_weight import read_row_weight
from dft.data.conversations.turns import SYSTEM_ROLES, Row, Turn, without_empty_system_turns
from dft.strict_json import json_type_name

RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt")
"""Variables that the trainer itself sets for every rendering, so `chat_template_kwargs` must not set them."""
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Conversation:
    """A validated conversation.

    Attributes:
        messages: objects with `role` and `content` (a string; "" in a turn that only calls tools or only
            reasons), with `tool_calls`, `reasoning_content`, `name` and any other keys of the row. No value
            at the top level of a message is null.
        supervised: for each message whether it is supervised. Only assistant turns can be.
        tools: tool definitions for the template, or None.
        variables: further variables for the template, from `chat_template_kwargs` of the row.
        places: for each message where the row has it ("conversations[0]"); () if `messages` is the row's.
        unread: columns of the row that are not part of the conversation.
        named: columns of the row that its rules name, also those that are null.
        weights: for each message its weight in the loss; () if all are 1.
    """

    messages: list[dict[str, Any]]
    supervised: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    named: tuple[str, ...] = field(default=(), compare=False)
    weights: tuple[float, ...] = ()

    def weight(self, index: int) -> float:
        """Return the weight of a message in the loss."""
        return self.weights[index] if self.weights else 1.0

    def place(self, index: int) -> str:
        """Return where the row has a message, for error messages.

        A row may have a message elsewhere than at its index in `messages`: empty system turns are left out,
        the system column is put in front, and each row form has keys of its own.
        """
        return self.places[index] if self.places else f"messages[{index}]"

    def last_turn_only(self) -> "Conversation":
        """Return a copy of the conversation in which only the last supervised turn is supervised."""
        last = max(index for index, supervised in enumerate(self.supervised) if supervised)
        return replace(self, supervised=tuple(index == last for index in range(len(self.supervised))))


def parse_conversation(text: bytes, rules: RowRules = NO_RULES) -> Conversation:
    """Parse a JSON object in any of the forms of `dft.data.conversations.forms`.

    Columns that are null and system or developer turns that are empty count as absent.

    Args:
        text: the JSON text of the row.
        rules: how the columns of its file are read.

    Raises:
        BadLine: broken JSON, a wrong type, an unknown form, role or content part, an empty turn, a column
            that changes what the row means, or no supervised turn.
        RowLeftOut: the row does not fulfil a condition of the rules, or its weight is 0.
    """
    row = parse_json(text)
    if not isinstance(row, dict):
        raise BadLine(
            f"expected a JSON object with {describe_forms()}, got {json_type_name(row)}", "not a JSON object"
        )
    named = tuple(key for key in row if key in rules.named) if rules.named else ()
    row = {key: value for key, value in row.items() if value is not None}
    left_out: tuple[str, ...] = ()
    last_only = False
    if len(row) > 1 or rules.change_rows:
        row, left_out, last_only = _apply_rules(row, rules)
    form = find_form(row)
    if form is None:
        raise no_form(row)
    row_weight = read_row_weight(row) if len(row) > 1 else 1.0
    read = form.read(row)
    turns = _add_system(row, without_empty_system_turns(read))
    if not any(turn.message["role"] == "assistant" for turn in turns):
        raise BadLine("no assistant turn, so there is nothing to learn from", "no assistant turn")
    supervised = tuple(turn.is_supervised for turn in turns)
    if True not in supervised:
        raise BadLine("no assistant turn is trained: all have train false or weight 0", "nothing is trained")
    conversation = Conversation(
        [turn.message for turn in turns],
        supervised,
        _read_tools(row, read),
        _read_variables(row),
        tuple(turn.place for turn in turns),
        unread=left_out + (unread_columns(row, form) if len(row) > 1 else ()),
        named=named,
        weights=_weights(turns, row_weight),
    )
    # In valid UTF-8, an unpaired surrogate can only appear as an escape.
    if SURROGATE_ESCAPE.search(text):
        _check_surrogates(conversation)
    return conversation.last_turn_only() if last_only else conversation


def _weights(turns: list[Turn], row_weight: float) -> tuple[float, ...]:
    """Return the weights of turns in a row with a weight, () if all are 1."""
    if row_weight == 1 and all(turn.weight == 1 for turn in turns):
        return ()
    return tuple(row_weight * turn.weight for turn in turns)


def _apply_rules(row: Row, rules: RowRules) -> tuple[Row, tuple[str, ...], bool]:
    """Rename and check the columns of a row.

    Returns:
        The row, its columns that the rules leave out, and whether only its last turn is to be supervised.
    """
    left_out: tuple[str, ...] = ()
    if rules.change_rows:
        row, left_out = apply_rules(row, rules)
    last_only = False
    if rules.use_chosen:
        row, last_only = take_chosen(row)
    check_meanings(row, rules)
    return row, left_out, last_only


def _add_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """Insert the `system` column as the first turn, unless a system or developer turn has the same text.

    Raises:
        BadLine: the column is no text, or a system or developer turn has another text.
    """
    system = row.get("system", "")
    if isinstance(system, list) and all(_is_text_block(block) for block in system):
        system = "".join(block["text"] for block in system)  # as in Anthropic's format
    if not isinstance(system, str):
        raise BadLine(f"'system' must be a string, got {json_type_name(system)}", "'system' is not a string")
    if not system.strip():
        return turns
    own = [turn for turn in turns if turn.message["role"] in SYSTEM_ROLES]
    if own:
        if all(turn.message["content"].strip() != system.strip() for turn in own):
            raise BadLine(
                f"'system' and {own[0].place} are different system prompts; --ignore_columns system "
                "leaves the column out",
                "two system prompts",
            )
        return turns
    return [Turn({"role": "system", "content": system}, False, "'system'"), *turns]


def _is_text_block(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)


def _read_variables(row: Row) -> dict[str, Any]:
    kind = "wrong 'chat_template_kwargs'"
    variables = row.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise BadLine(f"'chat_template_kwargs' must be an object, got {json_type_name(variables)}", kind)
    for name in RESERVED_VARIABLES:
        if name in variables:
            raise BadLine(f"'chat_template_kwargs' must not hold {name!r}, which is set from the row", kind)
    return variables


def _read_tools(row: Row, turns: list[Turn]) -> list[dict[str, Any]] | None:
    """Return the tool definitions of a row in the form that chat templates expect.

    Args:
        row: the row.
        turns: its turns, with the empty system turns, which may define tools.
    """
    sources = {
        "tools": row.get("tools"),
        "functions": row.get("functions"),  # the key used by OpenAI's format before 'tools'
        **{f"the part of type 'tools' of {turn.place}": turn.tools for turn in turns if turn.tools},
    }
    names = [name for name, value in sources.items() if value]
    if len(names) > 1:
        raise BadLine(f"{' and '.join(map(_quoted, names))} both define tools", "tools are defined twice")
    if not names:
        return None
    (name,) = names
    tools = sources[name]
    if isinstance(tools, str):
        tools = parse_json_string(_quoted(name), tools) if tools.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadLine(
            f"{_quoted(name)} must be a list of objects or a JSON string of such a list, got "
            f"{json_type_name(tools)}",
            "wrong 'tools'",
        )
    return [_function_tool(tool) for tool in tools] or None


def _quoted(name: str) -> str:
    return name if " " in name else f"'{name}'"


def _function_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool definition as `{"type": "function", "function": {...}}`, where it is the inner object.

    OpenAI's Responses API and Anthropic's Messages API write the type into the inner object.
    """
    kind = tool.get("type", "function")
    is_function = kind == "function" or (kind == "custom" and "input_schema" in tool)
    if "function" in tool or not is_function or not isinstance(tool.get("name"), str):
        return tool
    names = {"input_schema": "parameters"}  # Anthropic's name for it
    function = {names.get(key, key): value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def _check_surrogates(conversation: Conversation) -> None:
    parts: list[tuple[str, Any]] = [
        *zip(conversation.places, conversation.messages, strict=True),
        ("'tools'", conversation.tools),
        ("'chat_template_kwargs'", conversation.variables),
    ]
    for where, part in parts:
        try:
            json.dumps(part, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadLine(
                f"{where}: holds half a surrogate pair (\\ud800 to \\udfff), which is not a character",
                "half a surrogate pair",
            ) from None
