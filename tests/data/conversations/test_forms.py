"""Rows of every form are parsed into conversations, and invalid rows are errors with a reason."""

import json

import pytest

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.forms import columns

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
LINE = json.dumps({"messages": [USER, ANSWER]})
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
A_WEIGHT = "a weight: 0, or a number from 1e-06 to 1,000,000"
ROLES = "the roles are system, developer, user, assistant, tool"
FORMS = (
    "'messages', 'conversations', 'conversation', 'instruction' with 'output', 'response' or 'prompt' with "
    "'completion'"
)
RENAME = "--columns NAME=COLUMN reads a column under another name"
PRETRAINING = (
    "'text' without turns is text for pretraining, but this trainer fine-tunes on conversations and learns "
    f"only their answers; {RENAME}"
)
HALF = "holds half a surrogate pair (\\ud800 to \\udfff), which is not a character"


def parse(**row: object) -> Conversation:
    return parse_conversation(json.dumps(row).encode())


def parse_error(text: str | bytes) -> str:
    with pytest.raises(BadLine) as caught:
        parse_conversation(text if isinstance(text, bytes) else text.encode())
    assert caught.value.kind
    return str(caught.value)


def error_of(**row: object) -> str:
    return parse_error(json.dumps(row))


def turn(**fields: object) -> str:
    """Return a row whose second turn has these fields."""
    return json.dumps({"messages": [USER, {**ANSWER, **fields}]})


def second(**fields: object) -> dict[str, object]:
    """Return the second message of such a row, parsed."""
    return parse_conversation(turn(**fields).encode()).messages[1]


def sharegpt(*turns: tuple[str, object]) -> dict[str, object]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "broken JSON: Expecting value (column 15)"),
        ('{"messages": "abc', "broken JSON: Unterminated string starting at (column 14)"),
        (
            '{\n"a": 1,\n2}',
            "broken JSON: Expecting property name enclosed in double quotes (line 3, column 1)",
        ),
        (LINE + "x", f"broken JSON: Extra data (column {len(LINE) + 1})"),
        (LINE + "\0", f"broken JSON: Extra data (column {len(LINE) + 1})"),
        ('{"a": "x\ty"}', "broken JSON: Invalid control character at (column 9)"),
        ('{"score": NaN}', "broken JSON: NaN is not a JSON value"),
        ('{"score": -Infinity}', "broken JSON: -Infinity is not a JSON value"),
        ('{"a": 1, "a": 2}', "broken JSON: the key 'a' appears twice in one object"),
        ('{"n": ' + "9" * 5000 + "}", "broken JSON: a number of thousands of digits"),
        ('{"a":' * 100_000, "broken JSON: nested too deeply"),
        ("[" * 100_000, "broken JSON: nested too deeply"),
        ('"text"', f"expected a JSON object with {FORMS}, got a string"),
        ("3", f"expected a JSON object with {FORMS}, got a number"),
        ("null", f"expected a JSON object with {FORMS}, got null"),
        ("[1]", f"expected a JSON object with {FORMS}, got a list"),
    ],
)
def test_invalid_json_is_an_error(line, reason):
    assert parse_error(line) == reason


def test_invalid_utf8_is_an_error():
    assert parse_error(b'{"m": "\xff"}') == "not valid UTF-8 (invalid start byte at byte 7)"
    assert parse_error(LINE.encode("utf-16")) == (
        "not valid UTF-8 (invalid start byte at byte 0); it looks like UTF-16, which iconv -f UTF-16 -t "
        "UTF-8 converts"
    )
    raw = LINE.encode().replace(b'"q"', b'"\xed\xa0\x80"')
    assert parse_error(raw) == f"not valid UTF-8 (invalid continuation byte at byte {raw.index(0xED)})"


def test_half_a_surrogate_pair_is_an_error_in_every_used_column():
    assert parse_error(turn(content="\ud83d")) == f"messages[1]: {HALF}"
    assert parse_error(turn(note={"k": "\udc00"})) == f"messages[1]: {HALF}"
    assert error_of(messages=[USER, ANSWER], tools=[{"name": "\ud83d"}]) == f"'tools': {HALF}"
    message = error_of(messages=[USER, ANSWER], chat_template_kwargs={"a": "\ud83d"})
    assert message == f"'chat_template_kwargs': {HALF}"
    # In a string within the row, where only the second decoding produces a surrogate.
    calls = [{"name": "f", "arguments": json.dumps({"x": "\ud83d"})}]
    assert parse_error(turn(tool_calls=calls)) == f"messages[1]: {HALF}"


def test_errors_name_the_place_of_a_turn_in_the_row():
    """Empty system turns, the system column and other row forms move messages to other indices."""
    empty, broken = {"role": "system", "content": ""}, {"role": "assistant", "content": "\ud83d"}
    assert error_of(messages=[empty, USER, empty, broken]) == f"messages[3]: {HALF}"
    assert error_of(system="s", messages=[USER, broken]) == f"messages[1]: {HALF}"
    assert error_of(system="\ud83d", messages=[USER, ANSWER]) == f"'system': {HALF}"
    assert error_of(**sharegpt(("human", "q"), ("gpt", "\ud83d"))) == f"conversations[1]: {HALF}"
    assert error_of(prompt=[empty, USER], completion=[broken]) == f"completion[0]: {HALF}"
    assert error_of(prompt="\ud83d", completion="a") == f"prompt: {HALF}"
    conversation = parse(messages=[empty, USER, empty, ANSWER])
    assert [conversation.place(index) for index in (0, 1)] == ["messages[1]", "messages[3]"]
    assert Conversation([USER, ANSWER], (False, True)).place(1) == "messages[1]"


def test_escaped_surrogate_pair_is_one_character():
    assert "\\ud83d" in turn(content="😀")
    assert second(content="😀")["content"] == "😀"


def test_messages_are_unchanged_and_assistant_turns_are_supervised():
    system, developer = {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}
    tool = {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"}
    messages = [system, developer, USER, {**ANSWER, "note": {"a": None}}, tool, ANSWER]
    conversation = parse(messages=messages, other=1)
    assert conversation == Conversation(messages, (False, False, False, True, False, True), None, {})


def test_sharegpt_turns_are_converted_to_messages():
    names = ["system", "human", "user", "gpt", "chatgpt", "bing", "bard", "assistant", "model"]
    names += ["tool", "observation", "function_response"]
    conversation = parse(**sharegpt(*[(name, name) for name in names]))
    roles = ["system"] + ["user"] * 2 + ["assistant"] * 6 + ["tool"] * 3
    assert conversation.messages == [
        {"role": role, "content": name} for role, name in zip(roles, names, strict=True)
    ]
    assert conversation.supervised == tuple(role == "assistant" for role in roles)


def test_sharegpt_turns_may_have_role_and_content():
    conversation = parse(conversations=[USER, {"role": "gpt", "content": "a", "weight": 1}])
    assert conversation.messages == [USER, ANSWER]
    both = [{"from": "human", "value": "q", "role": "user", "content": None}, {"from": "gpt", "value": "a"}]
    assert parse(conversations=both).messages == [USER, ANSWER]


def test_turns_with_two_texts_or_two_roles_that_differ_are_errors():
    answer = {"from": "gpt", "value": "a"}
    first = {"from": "human", "value": "q"}
    assert parse(conversations=[{**first, "content": "q"}, answer]).messages == [USER, ANSWER]
    assert error_of(conversations=[{**first, "content": "x"}, answer]) == (
        "conversations[0]: 'value' and 'content' are different texts"
    )
    assert error_of(conversations=[{**first, "role": "gpt"}, answer]) == (
        "conversations[0]: 'from' and 'role' are different roles"
    )
    assert error_of(conversations=[{"role": "human", "content": "q", "value": "x"}, answer]) == (
        "conversations[0]: 'content' and 'value' are different texts"
    )
    assert error_of(messages=[USER, {**ANSWER, "value": "x"}]) == (
        "messages[1]: 'content' and 'value' are different texts"
    )
    assert parse(messages=[USER, {**ANSWER, "value": "a"}]).messages[1]["content"] == "a"


def test_pairs_of_texts_with_other_keys_are_errors():
    for pair, key in (
        ({"human": "q", "bot": "a"}, "bot"),
        ({"human": "q", "assistant": "a", "input": "x"}, "input"),
        ({"human": "q", "assistant": "a", "gpt": "b"}, "gpt"),
        ({"human": "q", "assistant": "a", "content": ["x"]}, "content"),
    ):
        assert error_of(conversation=[pair, {"human": "q", "assistant": "a"}]) == (
            f"conversation[0]: '{key}' beside 'human'; a pair has 'human' and 'assistant'"
        )
    pair = {"human": "q", "assistant": "a", "id": 3}
    assert parse(conversation=[pair, {"human": "q"}]).messages == [USER, {**ANSWER, "id": 3}, USER]


def test_sharegpt_function_call_is_converted_to_tool_calls():
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    for value, count in ((call, 1), (f"[{call}, {call}]", 2), (json.loads(call), 1)):
        conversation = parse(
            **sharegpt(("human", "q"), ("function_call", value), ("observation", "r"), ("gpt", "a"))
        )
        assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL] * count}
        assert conversation.supervised == (False, True, False, True)


def test_prompt_and_completion_texts_are_one_user_and_one_assistant_turn():
    conversation = parse(prompt="q", completion=" a\n")
    assert conversation.messages == [USER, {"role": "assistant", "content": " a\n"}]
    assert conversation.supervised == (False, True)


def test_only_turns_of_the_completion_list_are_supervised():
    conversation = parse(
        prompt=[USER, ANSWER, USER], completion=[ANSWER, USER, {**ANSWER, "train": False}, ANSWER]
    )
    assert conversation.messages == [USER, ANSWER, USER, ANSWER, USER, ANSWER, ANSWER]
    assert conversation.supervised == (False, False, False, True, False, False, True)


def test_columns_that_are_null_count_as_absent():
    nothing = dict.fromkeys(columns())
    rows = (
        {"messages": [USER, ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"instruction": "q", "output": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
    )
    for row in rows:
        assert parse(**nothing | row) == parse(messages=[USER, ANSWER])


def test_row_that_has_the_keys_of_two_forms_is_an_error_that_names_both():
    two = {"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}
    assert error_of(**two) == (
        "the row can be read in 2 ways, by 'messages' and 'conversations'; leave the columns of the others "
        "out with --ignore_columns"
    )
    assert "in 2 ways, by 'instruction' with 'output' and 'response';" in error_of(
        instruction="q", output="a", response="a"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, f"no conversation; the object is empty, expected {FORMS}; {RENAME}"),
        ({"text": "", "id": 1}, PRETRAINING),
        ({"messages": None}, f"no conversation; the object is empty, expected {FORMS}; {RENAME}"),
        ({"prompt": "q"}, f"no conversation; the keys are ['prompt'], expected {FORMS}; {RENAME}"),
        ({"messages": []}, "'messages' must be a list of at least one turn, got an empty list"),
        ({"messages": {}}, "'messages' must be a list of at least one turn, got an object"),
        ({"messages": "hi"}, "'messages' must be a list of at least one turn, got a string"),
        ({"conversations": []}, "'conversations' must be a list of at least one turn, got an empty list"),
        ({"messages": ["hi"]}, "messages[0] must be an object with 'role' and 'content', got a string"),
        ({"messages": [{"content": "x"}]}, "messages[0]: no 'role'; the keys are ['content']"),
        ({"conversations": [1]}, "conversations[0] must be an object with 'from' and 'value', got a number"),
        ({"conversations": [{"value": "x"}]}, "conversations[0]: no 'from'; the keys are ['value']"),
        (sharegpt(("human", None)), "conversations[0]: 'value' must be a string, got null"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: 'value' must be a string, got nothing"),
        (sharegpt(("human", "")), "conversations[0]: empty user turn"),
        (
            sharegpt(("robot", "x")),
            "conversations[0]: unknown from 'robot'; it must be one of system, developer, user, assistant, "
            "tool, human, gpt, chatgpt, bing, bard, model, observation, function_response, tool_response, "
            "function, function_call, tool_call",
        ),
        (
            sharegpt(("function_call", "f(1)")),
            "conversations[0]: 'value' of a function_call: broken JSON: Expecting value (column 1)",
        ),
        (sharegpt(("function_call", "[]")), "conversations[0]: 'value' of a function_call holds no call"),
        (
            sharegpt(("function_call", "3")),
            "conversations[0]: 'tool_calls' must be a list of objects, got a number",
        ),
        ({"prompt": "", "completion": "a"}, "prompt: empty user turn"),
        ({"prompt": "q", "completion": " "}, "completion: empty assistant turn"),
        (
            {"prompt": "q", "completion": [ANSWER]},
            "'prompt' and 'completion' must both be strings or both be lists of turns, "
            "got a string and a list",
        ),
        (
            {"prompt": [], "completion": [ANSWER]},
            "'prompt' must be a list of at least one turn, got an empty list",
        ),
        (
            {"prompt": [USER], "completion": ["a"]},
            "completion[0] must be an object with 'role' and 'content', got a string",
        ),
        (
            {"prompt": [ANSWER], "completion": [USER]},
            "no assistant turn in 'completion', so there is nothing to learn from",
        ),
    ],
)
def test_rows_without_a_valid_form_are_errors(row, reason):
    assert parse_error(json.dumps(row)) == reason


def test_tools_may_be_a_list_or_a_json_string():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}}]
    assert parse(messages=[USER, ANSWER], tools=tools).tools == tools
    assert parse(messages=[USER, ANSWER], tools=json.dumps(tools)).tools == tools
    for nothing in (None, [], "", " ", "[]"):
        assert parse(messages=[USER, ANSWER], tools=nothing).tools is None


@pytest.mark.parametrize(
    ("tools", "got"),
    [
        ({"name": "f"}, "an object"),
        (["f"], "a list"),
        (5, "a number"),
        ("{}", "an object"),
        ("3", "a number"),
    ],
)
def test_tools_of_a_wrong_type_are_an_error(tools, got):
    expected = "'tools' must be a list of objects or a JSON string of such a list"
    assert error_of(messages=[USER, ANSWER], tools=tools) == f"{expected}, got {got}"


def test_tools_string_must_be_strict_json():
    message = error_of(messages=[USER, ANSWER], tools='[{"a": 1, "a": 2}]')
    assert message == "'tools': broken JSON: the key 'a' appears twice in one object"


def test_system_column_becomes_the_first_turn_unless_there_is_a_system_turn():
    conversation = parse(system="s", **sharegpt(("human", "q"), ("gpt", "a")))
    assert conversation.messages == [{"role": "system", "content": "s"}, USER, ANSWER]
    assert conversation.supervised == (False, False, True)
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "own"}, USER, ANSWER]
        assert parse(system="own\n", messages=messages).messages == messages
        assert error_of(system="s", messages=messages) == (
            "'system' and messages[0] are different system prompts; --ignore_columns system leaves the "
            "column out"
        )
    for nothing in ("", " \n", None):
        assert parse(system=nothing, messages=[USER, ANSWER]).messages == [USER, ANSWER]
    assert error_of(system=["s"], messages=[USER, ANSWER]) == "'system' must be a string, got a list"


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["", " \n\t", None, [], [{"type": "text", "text": " "}]])
def test_empty_system_turn_counts_as_absent_in_every_row_form(role, content):
    empty = {"role": role, "content": content}
    answer = {**ANSWER, "train": False}
    messages = [empty, USER, answer, {**empty, "weight": 0, "name": None, "tools": []}, USER, ANSWER]
    conversation = parse(messages=messages)
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]
    assert conversation.supervised == (False, False, False, True)
    named = {"from": role, "value": content}
    assert parse(conversations=[named, USER, answer, empty, USER, ANSWER]) == conversation
    assert parse(prompt=[empty, USER, answer, USER], completion=[empty, ANSWER]) == conversation


def test_system_column_is_used_if_the_system_turn_is_empty():
    messages = [{"role": "system", "content": " "}, USER, ANSWER]
    assert parse(system="s", messages=messages).messages == [{"role": "system", "content": "s"}, USER, ANSWER]


def test_conversation_of_only_empty_system_turns_is_an_error():
    empty = {"role": "system", "content": ""}
    for row in ({"messages": [empty, empty]}, {"conversations": [empty]}):
        assert error_of(**row) == "no assistant turn, so there is nothing to learn from"
    message = error_of(prompt=[empty], completion=[empty])
    assert message == "no assistant turn in 'completion', so there is nothing to learn from"
    assert error_of(messages=[{"role": "system"}]) == "messages[0]: 'content' must be a string, got nothing"


def test_chat_template_kwargs_must_be_an_object():
    variables = {"enable_thinking": False, "date": None}
    assert parse(messages=[USER, ANSWER], chat_template_kwargs=variables).variables == variables
    assert parse(messages=[USER, ANSWER], chat_template_kwargs=None).variables == {}
    message = error_of(messages=[USER, ANSWER], chat_template_kwargs=[1])
    assert message == "'chat_template_kwargs' must be an object, got a list"
    message = error_of(messages=[USER, ANSWER], chat_template_kwargs={"messages": []})
    assert message == "'chat_template_kwargs' must not hold 'messages', which is set from the row"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"role": "bot"}, f"unknown role 'bot'; {ROLES}"),
        ({"role": "Assistant"}, f"unknown role 'Assistant'; {ROLES}"),
        ({"role": None}, f"unknown role None; {ROLES}"),
        ({"role": ["user"]}, f"unknown role ['user']; {ROLES}"),
        ({"role": "r" * 500}, f"unknown role 'rrr{'r' * 73}...; {ROLES}"),
        ({"content": None}, "'content' must be a string, got null"),
        ({"content": 5.5}, "'content' must be a string, got a number"),
        ({"content": True}, "'content' must be a string, got a boolean"),
        ({"content": {}}, "'content' must be a string, got an object"),
        ({"content": " \n\t"}, "empty assistant turn"),
        ({"content": "", "train": False}, "empty assistant turn"),
        ({"content": []}, "empty assistant turn"),
        ({"content": [{"type": "text", "text": " "}]}, "empty assistant turn"),
        ({"role": "system", "content": "", "note": "f"}, "empty system turn with ['note']"),
        (
            {"role": "system", "tools": [{"name": "f"}]},
            "'tools' stands in a message; make it a column of the row",
        ),
        (
            {"trainable": False},
            "'trainable' is False; this trainer reads 'train', true or false, which says whether "
            "a turn is trained",
        ),
        (
            {"label": False},
            "'label' is False: it says how good an answer is, and this trainer learns every answer; "
            'remove it, or write "train": false in this turn',
        ),
        (
            {"function_call": {"name": "f"}, "tool_calls": [{"name": "g"}]},
            "a call in 'function_call' and in 'tool_calls'",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}}]},
            ".tool_calls[0]: arguments in 'arguments' and in 'parameters'",
        ),
        ({"role": "user", "content": "", "reasoning_content": "r"}, "empty user turn"),
        ({"content": "", "reasoning_content": " "}, "empty assistant turn"),
        (
            {"content": [{"type": "image", "url": "x"}]},
            "'content[0]' must be a text part, got a part of type 'image'",
        ),
        ({"content": ["x", {"type": "text"}]}, "'content[1]' must be a text part, got a part without text"),
        ({"content": [{"text": "x"}]}, "'content[0]' must be a text part, got an object"),
        ({"content": [3]}, "'content[0]' must be a text part, got a number"),
        ({"reasoning_content": ["r"]}, "'reasoning_content' must be a string, got a list"),
        ({"thinking": True}, "'thinking' must be a string, got a boolean"),
        ({"name": 3}, "'name' must be a string, got a number"),
        ({"tool_calls": "f()"}, "'tool_calls' must be a list of objects, got a string"),
        ({"tool_calls": ["f()"]}, "'tool_calls' must be a list of objects, got a list"),
        ({"tool_calls": {}}, "'tool_calls' must be a list of objects, got an object"),
        ({"tool_calls": [{"function": "f"}]}, ".tool_calls[0]: 'function' must be an object, got a string"),
        (
            {"tool_calls": [{"name": ""}]},
            ".tool_calls[0]: 'name' must be the name of a function, got an empty string",
        ),
        ({"tool_calls": [{}]}, ".tool_calls[0]: 'name' must be the name of a function, got nothing"),
        (
            {"tool_calls": [{"name": 5}]},
            ".tool_calls[0]: 'name' must be the name of a function, got a number",
        ),
        (
            {"tool_calls": [CALL, {"name": "f", "arguments": "{"}]},
            ".tool_calls[1]: 'arguments': broken JSON: "
            "Expecting property name enclosed in double quotes (column 2)",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            ".tool_calls[0]: 'arguments' must be an object or a JSON string of an object, got a list",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": [1]}]},
            ".tool_calls[0]: 'arguments' must be an object or a JSON string of an object, got a list",
        ),
        ({"train": 1}, "'train' must be true or false, got 1"),
        ({"train": "no"}, "'train' must be true or false, got 'no'"),
        ({"weight": -0.5}, f"'weight' must be {A_WEIGHT}, got -0.5"),
        ({"weight": True}, f"'weight' must be {A_WEIGHT}, got True"),
        ({"weight": "1"}, f"'weight' must be {A_WEIGHT}, got '1'"),
        ({"weight": [0]}, f"'weight' must be {A_WEIGHT}, got [0]"),
        ({"weight": 0.5, "loss_scale": 2}, "'weight' is 0.5 but 'loss_scale' is 2"),
        ({"train": False, "weight": 0.5}, "'train' is false but 'weight' is 0.5"),
        ({"train": True, "weight": 0}, "'train' is true but 'weight' is 0"),
        ({"train": False, "weight": 1.0}, "'train' is false but 'weight' is 1.0"),
        ({"role": "user", "train": True}, "'train' is true on a user turn; only assistant turns are trained"),
    ],
)
def test_invalid_turns_are_errors(fields, reason):
    assert parse_error(turn(**fields)) == f"messages[1]{'' if reason.startswith('.') else ': '}{reason}"


def test_conversations_without_supervised_turns_are_errors():
    assert error_of(messages=[{"role": "user"}]) == "messages[0]: 'content' must be a string, got nothing"
    assert error_of(messages=[USER]) == "no assistant turn, so there is nothing to learn from"
    for fields in ({"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}):
        message = "no assistant turn is trained: all have train false or weight 0"
        assert parse_error(turn(**fields)) == message


def test_null_keys_and_empty_tool_calls_are_dropped():
    empty = {"tool_calls": [], "reasoning_content": None, "name": None, "train": None, "weight": None}
    assert second(**empty) == ANSWER


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, "b", {"type": "text", "text": ""}]
    assert second(content=parts) == {"role": "assistant", "content": "a b"}
    assert second(content=[], tool_calls=[CALL])["content"] == ""
    tool = {"role": "tool", "content": []}
    assert parse(messages=[USER, ANSWER, tool]).messages[2] == {"role": "tool", "content": ""}


def test_turn_with_tool_calls_or_reasoning_needs_no_content():
    for content in (None, ""):
        assert second(content=content, tool_calls=[CALL]) == {**ANSWER, "content": "", "tool_calls": [CALL]}
        for name in ("reasoning_content", "reasoning", "thinking"):
            assert second(content=content, **{name: "r"}) == {**ANSWER, "content": "", name: "r"}


@pytest.mark.parametrize(
    ("call", "clean"),
    [
        ({"name": "f", "arguments": {"x": 1}}, CALL),
        ({"name": "f", "arguments": '{"x": 1}'}, CALL),
        ({"id": "1", "name": "f", "arguments": {"x": 1}}, {"id": "1", **CALL}),
        ({"id": None, **CALL}, CALL),
        ({"function": {"name": "f", "arguments": '{"x": 1}'}}, {"function": CALL["function"]}),
        ({"name": "f"}, {"type": "function", "function": {"name": "f", "arguments": {}}}),
        (
            {"name": "f", "arguments": '{"x": null}'},
            {"type": "function", "function": {"name": "f", "arguments": {"x": None}}},
        ),
    ],
)
def test_tool_calls_are_normalized_for_templates(call, clean):
    assert second(tool_calls=[call])["tool_calls"] == [clean]


def test_train_and_weight_select_the_supervised_assistant_turns():
    fields = [
        {"train": False},
        {"train": True},
        {"weight": 0},
        {"weight": 1.0},
        {"train": True, "weight": 1},
        {},
    ]
    conversation = parse(messages=[USER, *({**ANSWER, **field} for field in fields)])
    assert conversation.supervised == (False, False, True, False, True, True, True)
    assert conversation.messages == [USER, *[ANSWER] * 6]


def test_weights_of_turns_are_read():
    fields = [{"weight": 0.25}, {"train": True, "loss_weight": 2}, {"loss_scale": 0.5, "weight": 0.5}, {}]
    conversation = parse(messages=[USER, *({**ANSWER, **field} for field in fields)])
    assert conversation.weights == (1, 0.25, 2, 0.5, 1)
    assert conversation.messages == [USER, *[ANSWER] * 4] and conversation.supervised == (False, *[True] * 4)


def test_a_call_of_another_weight_is_a_turn_of_its_own():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    equal = parse(conversations=[USER, {**call, "weight": 0.5}, {**call, "weight": 0.5}])
    assert len(equal.messages) == 2 and equal.weights == (1, 0.5)
    different = parse(conversations=[USER, {**call, "weight": 0.5}, call])
    assert len(different.messages) == 3 and different.weights == (1, 0.5, 1)


def test_train_and_weight_are_removed_from_other_turns():
    for fields in ({"train": False}, {"weight": 0.5}, {"weight": 0}, {"train": False, "weight": 1}):
        conversation = parse(messages=[{**USER, **fields}, ANSWER])
        assert (conversation.messages, conversation.supervised) == ([USER, ANSWER], (False, True))


def test_last_turn_only_supervises_the_last_supervised_turn():
    conversation = parse(messages=[ANSWER, USER, ANSWER, USER, {**ANSWER, "train": False}, USER])
    assert conversation.supervised == (True, False, True, False, False, False)
    last = conversation.last_turn_only()
    assert last.supervised == (False, False, True, False, False, False)
    assert last.messages == conversation.messages


def test_function_call_key_is_converted_to_tool_calls():
    row = {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]}
    (_, message) = parse(**row).messages
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}
