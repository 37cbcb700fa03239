"""A row in any of the accepted forms becomes one clean conversation, or is refused with the reason."""

import json

import pytest

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.forms import columns

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
LINE = json.dumps({"messages": [USER, ANSWER]})
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROLES = "the roles are system, developer, user, assistant, tool"
FORMS = "'messages', 'conversations' or 'prompt' with 'completion'"
HALF = "holds half a surrogate pair (\\ud800 to \\udfff), which is no character"


def parse(**row: object) -> Conversation:
    return parse_conversation(json.dumps(row).encode())


def refusal(text: str | bytes) -> str:
    with pytest.raises(BadLine) as caught:
        parse_conversation(text if isinstance(text, bytes) else text.encode())
    assert caught.value.kind
    return str(caught.value)


def refused(**row: object) -> str:
    return refusal(json.dumps(row))


def turn(**fields: object) -> str:
    """A row whose second turn is overridden by `fields`."""
    return json.dumps({"messages": [USER, {**ANSWER, **fields}]})


def second(**fields: object) -> dict[str, object]:
    """The second message of such a row."""
    return parse_conversation(turn(**fields).encode()).messages[1]


def sharegpt(*turns: tuple[str, object]) -> dict[str, object]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


# ---- JSON ----


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "broken JSON: Expecting value (column 15)"),
        ('{"messages": "abc', "broken JSON: Unterminated string starting at (column 14)"),
        (
            '{\n"a": 1,\n}',
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
def test_text_that_is_no_strict_json_object_is_refused(line, reason):
    assert refusal(line) == reason


def test_bytes_that_are_not_utf8_are_refused():
    assert refusal(b'{"m": "\xff"}') == "not valid UTF-8 (invalid start byte at byte 7)"
    assert refusal(LINE.encode("utf-16")) == "not valid UTF-8 (invalid start byte at byte 0)"
    raw = LINE.encode().replace(b'"q"', b'"\xed\xa0\x80"')
    assert refusal(raw) == f"not valid UTF-8 (invalid continuation byte at byte {raw.index(0xED)})"


def test_half_a_surrogate_pair_is_refused_wherever_it_is_used():
    assert refusal(turn(content="\ud83d")) == f"messages[1]: {HALF}"
    assert refusal(turn(note={"k": "\udc00"})) == f"messages[1]: {HALF}"
    assert refused(messages=[USER, ANSWER], tools=[{"name": "\ud83d"}]) == f"'tools': {HALF}"
    told = refused(messages=[USER, ANSWER], chat_template_kwargs={"a": "\ud83d"})
    assert told == f"'chat_template_kwargs': {HALF}"
    # In a string within the row, where only the second decoding makes a surrogate of it.
    calls = [{"name": "f", "arguments": json.dumps({"x": "\ud83d"})}]
    assert refusal(turn(tool_calls=calls)) == f"messages[1]: {HALF}"


def test_a_pair_of_surrogate_escapes_is_a_character():
    assert "\\ud83d" in turn(content="😀")
    assert second(content="😀")["content"] == "😀"


# ---- forms ----


def test_messages_are_taken_as_they_are_and_assistant_turns_are_trained():
    system, developer = {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}
    tool = {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"}
    messages = [system, developer, USER, {**ANSWER, "note": {"a": None}}, tool, ANSWER]
    made = parse(messages=messages, other=1)
    assert made == Conversation(messages, (False, False, False, True, False, True), None, {})


def test_sharegpt_turns_become_messages():
    names = ["system", "human", "user", "gpt", "chatgpt", "bing", "bard", "assistant", "model"]
    names += ["tool", "observation", "function_response"]
    made = parse(**sharegpt(*[(name, name) for name in names]))
    roles = ["system"] + ["user"] * 2 + ["assistant"] * 6 + ["tool"] * 3
    assert made.messages == [{"role": role, "content": name} for role, name in zip(roles, names, strict=True)]
    assert made.supervised == tuple(role == "assistant" for role in roles)


def test_sharegpt_may_hold_roles_and_contents_too():
    made = parse(conversations=[USER, {"role": "gpt", "content": "a", "weight": 1}])
    assert made.messages == [USER, ANSWER]
    both = [{"from": "human", "value": "q", "role": "gpt", "content": None}, {"from": "gpt", "value": "a"}]
    assert parse(conversations=both).messages == [USER, ANSWER]


def test_a_function_call_of_sharegpt_becomes_tool_calls():
    one = json.dumps({"name": "f", "arguments": {"x": 1}})
    for value, count in ((one, 1), (f"[{one}, {one}]", 2), (json.loads(one), 1)):
        made = parse(**sharegpt(("human", "q"), ("function_call", value), ("observation", "r"), ("gpt", "a")))
        assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL] * count}
        assert made.supervised == (False, True, False, True)


def test_prompt_and_completion_of_text_are_one_exchange():
    made = parse(prompt="q", completion=" a\n")
    assert made.messages == [USER, {"role": "assistant", "content": " a\n"}]
    assert made.supervised == (False, True)


def test_of_lists_only_the_turns_of_the_completion_are_trained():
    made = parse(prompt=[USER, ANSWER, USER], completion=[ANSWER, USER, {**ANSWER, "train": False}, ANSWER])
    assert made.messages == [USER, ANSWER, USER, ANSWER, USER, ANSWER, ANSWER]
    assert made.supervised == (False, False, False, True, False, False, True)


def test_the_first_form_that_is_not_null_is_taken():
    nothing = dict.fromkeys(columns())
    other = [USER, {"role": "assistant", "content": "b"}]
    assert parse(**nothing | {"messages": [USER, ANSWER], "conversations": other}).messages[1] == ANSWER
    assert parse(**nothing | {"conversations": other, "prompt": "q", "completion": "c"}).messages == other
    assert parse(**nothing | {"prompt": "q", "completion": "a"}) == parse(messages=[USER, ANSWER])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, f"no conversation; the object is empty, expected {FORMS}"),
        ({"text": "", "id": 1}, f"no conversation; the keys are ['id', 'text'], expected {FORMS}"),
        ({"messages": None}, f"no conversation; the object is empty, expected {FORMS}"),
        ({"prompt": "q"}, f"no conversation; the keys are ['prompt'], expected {FORMS}"),
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
            "tool, human, gpt, chatgpt, bing, bard, model, observation, function_response, function_call",
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
def test_rows_without_a_usable_form_are_refused(row, reason):
    assert refusal(json.dumps(row)) == reason


# ---- columns beside the conversation ----


def test_tools_may_be_a_list_or_its_json():
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
def test_tools_of_another_type_are_refused(tools, got):
    expected = "'tools' must be a list of objects or a JSON string of one"
    assert refused(messages=[USER, ANSWER], tools=tools) == f"{expected}, got {got}"


def test_tools_in_a_string_are_strict_json_too():
    told = refused(messages=[USER, ANSWER], tools='[{"a": 1, "a": 2}]')
    assert told == "'tools': broken JSON: the key 'a' appears twice in one object"


def test_the_system_column_becomes_the_first_turn_where_there_is_no_other():
    made = parse(system="s", **sharegpt(("human", "q"), ("gpt", "a")))
    assert made.messages == [{"role": "system", "content": "s"}, USER, ANSWER]
    assert made.supervised == (False, False, True)
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "own"}, USER, ANSWER]
        assert parse(system="s", messages=messages).messages == messages
    for nothing in ("", " \n", None):
        assert parse(system=nothing, messages=[USER, ANSWER]).messages == [USER, ANSWER]
    assert refused(system=["s"], messages=[USER, ANSWER]) == "'system' must be a string, got a list"


def test_variables_for_the_template_are_an_object():
    variables = {"enable_thinking": False, "date": None}
    assert parse(messages=[USER, ANSWER], chat_template_kwargs=variables).variables == variables
    assert parse(messages=[USER, ANSWER], chat_template_kwargs=None).variables == {}
    told = refused(messages=[USER, ANSWER], chat_template_kwargs=[1])
    assert told == "'chat_template_kwargs' must be an object, got a list"
    told = refused(messages=[USER, ANSWER], chat_template_kwargs={"messages": []})
    assert told == "'chat_template_kwargs' must not hold 'messages', which is made from the row"


# ---- turns ----


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
        ({"role": "system", "content": ""}, "empty system turn"),
        ({"role": "user", "content": "", "reasoning_content": "r"}, "empty user turn"),
        ({"content": "", "reasoning_content": " "}, "empty assistant turn"),
        (
            {"content": [{"type": "image", "url": "x"}]},
            "'content[0]' must be a part of text, got one of type 'image'",
        ),
        ({"content": ["x", {"type": "text"}]}, "'content[1]' must be a part of text, got one without text"),
        ({"content": [{"text": "x"}]}, "'content[0]' must be a part of text, got an object"),
        ({"content": [3]}, "'content[0]' must be a part of text, got a number"),
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
            ".tool_calls[0]: 'arguments' must be an object or a JSON string of one, got a list",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": [1]}]},
            ".tool_calls[0]: 'arguments' must be an object or a JSON string of one, got a list",
        ),
        ({"train": 1}, "'train' must be true or false, got 1"),
        ({"train": "no"}, "'train' must be true or false, got 'no'"),
        ({"weight": 0.5}, "'weight' must be 0 or 1, got 0.5"),
        ({"weight": True}, "'weight' must be 0 or 1, got True"),
        ({"weight": "1"}, "'weight' must be 0 or 1, got '1'"),
        ({"weight": [0]}, "'weight' must be 0 or 1, got [0]"),
        ({"train": True, "weight": 0}, "'train' is true but 'weight' is 0"),
        ({"train": False, "weight": 1.0}, "'train' is false but 'weight' is 1.0"),
        ({"role": "user", "train": True}, "'train' is true on a user turn; only assistant turns are trained"),
    ],
)
def test_turns_that_cannot_be_used_are_refused(fields, reason):
    assert refusal(turn(**fields)) == f"messages[1]{'' if reason.startswith('.') else ': '}{reason}"


def test_conversations_that_teach_nothing_are_refused():
    assert refused(messages=[{"role": "user"}]) == "messages[0]: 'content' must be a string, got nothing"
    assert refused(messages=[USER]) == "no assistant turn, so there is nothing to learn from"
    for fields in ({"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}):
        told = "no assistant turn is trained: all have train false or weight 0"
        assert refusal(turn(**fields)) == told


def test_null_keys_and_empty_lists_of_calls_are_dropped():
    empty = {"tool_calls": [], "reasoning_content": None, "name": None, "train": None, "weight": None}
    assert second(**empty) == ANSWER


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a "}, "b", {"type": "text", "text": ""}]
    assert second(content=parts) == {"role": "assistant", "content": "a b"}
    assert second(content=[], tool_calls=[CALL])["content"] == ""
    tool = {"role": "tool", "content": []}
    assert parse(messages=[USER, ANSWER, tool]).messages[2] == {"role": "tool", "content": ""}


def test_a_turn_that_only_calls_tools_or_reasons_needs_no_content():
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
def test_tool_calls_get_the_one_form_that_templates_expect(call, clean):
    assert second(tool_calls=[call])["tool_calls"] == [clean]


def test_train_and_weight_say_which_assistant_turns_are_supervised():
    fields = [
        {"train": False},
        {"train": True},
        {"weight": 0},
        {"weight": 1.0},
        {"train": True, "weight": 1},
        {},
    ]
    made = parse(messages=[USER, *({**ANSWER, **one} for one in fields)])
    assert made.supervised == (False, False, True, False, True, True, True)
    assert made.messages == [USER, *[ANSWER] * 6]


def test_on_other_turns_they_are_taken_away_and_mean_nothing():
    for fields in ({"train": False}, {"weight": 1}, {"weight": 0}, {"train": False, "weight": 1}):
        made = parse(messages=[{**USER, **fields}, ANSWER])
        assert (made.messages, made.supervised) == ([USER, ANSWER], (False, True))


def test_only_the_last_supervised_turn_may_be_kept():
    made = parse(messages=[ANSWER, USER, ANSWER, USER, {**ANSWER, "train": False}, USER])
    assert made.supervised == (True, False, True, False, False, False)
    last = made.last_turn_only()
    assert last.supervised == (False, False, True, False, False, False)
    assert last.messages == made.messages


def test_the_older_name_of_a_call_is_converted():
    row = {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]}
    (_, message) = parse(**row).messages
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}
