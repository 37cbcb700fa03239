"""Rows as public data sets and other trainers write them, in each row form."""

import json

import pytest

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
EARLIER = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def parse(**row: object) -> Conversation:
    return parse_conversation(json.dumps(row).encode())


def error_of(**row: object) -> str:
    with pytest.raises(BadLine) as caught:
        parse(**row)
    assert caught.value.kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "q", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "", "input": "q", "output": "a"}, [USER, ANSWER]),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            [{"role": "user", "content": "q\ni"}, ANSWER],
        ),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            [SYSTEM, *EARLIER, USER, ANSWER],
        ),
        ({"query": "q", "response": "a"}, [USER, ANSWER]),
        ({"query": "q", "response": "a", "history": []}, [USER, ANSWER]),
        (
            {"system": "s", "query": "q", "response": "a", "history": '[["q0", "a0"]]'},
            [SYSTEM, *EARLIER, USER, ANSWER],
        ),
        ({"response": "a"}, [ANSWER]),
        ({"response": "a", "system": "s", "query": None}, [SYSTEM, ANSWER]),
        (
            {
                "system": "s",
                "conversation": [{"human": "q0", "assistant": "a0"}, {"human": "q", "assistant": "a"}],
            },
            [SYSTEM, *EARLIER, USER, ANSWER],
        ),
        ({"conversation": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"conversation": [{"system": "s", "input": "q0", "output": "a0"}, {"input": "q", "output": "a"}]},
            [SYSTEM, *EARLIER, USER, ANSWER],
        ),
        ({"messages": [{"system": "", "user": "q", "assistant": "a"}]}, [USER, ANSWER]),
        ({"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "parallel_tool_calls": False}, [USER, ANSWER]),
    ],
)  # fmt: skip
def test_rows_of_every_form_become_the_same_messages(row, messages):
    conversation = parse(**row)
    assert conversation.messages == messages
    assert conversation.supervised == tuple(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": 3, "output": "a"}, "'instruction' must be a string, got a number"),
        ({"instruction": "q", "output": ["a", "b"]}, "'output' must be a string, got a list"),
        ({"instruction": " ", "input": "", "output": "a"}, "instruction: empty user turn"),
        ({"query": "q", "response": ""}, "response: empty assistant turn"),
        ({"query": "q", "response": "a", "history": "x"}, "'history' must be a list of pairs, got a string"),
        (
            {"query": "q", "response": "a", "history": [["q0"]]},
            "history[0] must be a pair of two strings, a question and its answer, got a list",
        ),
        (
            {"query": "q", "response": "a", "history": [["q0", None]]},
            "history[0] must be a pair of two strings, a question and its answer, got null",
        ),
        ({"query": "q", "response": "a", "history": [["q0", ""]]}, "history[0]: empty assistant turn"),
        ({"conversation": [{"human": "q", "assistant": ""}]}, "conversation[0]: empty assistant turn"),
        ({"conversation": [{"human": "q"}]}, "no assistant turn, so there is nothing to learn from"),
    ],
)
def test_invalid_texts_of_a_form_are_errors(row, reason):
    assert error_of(**row) == reason


def test_a_column_that_may_be_part_of_the_conversation_is_never_left_out():
    remedy = "--columns NAME=COLUMN reads a column under another name"
    assert error_of(instruction="q", context="c", response="a") == (
        "'response' without 'query' is read only where there is no other column, and the row also has "
        f"'instruction'; {remedy}, --ignore_columns instruction leaves it out"
    )
    assert error_of(prompt="q", completion="a", question="x") == (
        "the row is read by 'prompt' with 'completion', and the row also has 'question'; "
        f"{remedy}, --ignore_columns question leaves it out"
    )
    assert parse(prompt="q", completion="a", question="").messages == [USER, ANSWER]
    assert parse(messages=[USER, ANSWER], prompt="q").unread == ("prompt",)


def test_parts_with_values_become_text_reasoning_tool_calls_and_tools():
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    row = {
        "messages": [
            {
                "role": "system",
                "content": [{"type": "text", "value": "s"}, {"type": "tools", "value": json.dumps([TOOL])}],
                "loss_weight": 0.0,
            },
            {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "r"},
                    {"type": "tool_call", "value": call},
                    {"type": "tool_call", "value": json.loads(call)},
                ],
                "loss_weight": 0.0,
            },
            {"role": "tool", "content": [{"type": "text", "value": "1"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "a"}], "loss_weight": 1.0},
        ]
    }
    conversation = parse(**row)
    assert conversation.messages == [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    assert conversation.supervised == (False, False, False, False, True)
    assert conversation.tools == [TOOL]


def test_anthropic_blocks_become_reasoning_tool_calls_and_tool_turns():
    conversation = parse(
        system=[{"type": "text", "text": "s"}],
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        messages=[
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "r", "signature": "x"},
                    {"type": "text", "text": "see"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "1"}]},
                    {"type": "text", "text": "q"},
                ],
            },
            ANSWER,
        ],
    )
    assert conversation.messages == [
        SYSTEM,
        USER,
        {
            "role": "assistant",
            "content": "see",
            "reasoning_content": "r",
            "tool_calls": [{"type": "function", "id": "t1", "function": CALL["function"]}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "t1"},
        USER,
        ANSWER,
    ]
    assert conversation.supervised == (False, False, True, False, False, True)
    assert conversation.tools == [TOOL]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "a"}],
            "messages[1]: 'content[1]': text after a tool call, but a chat template writes the reasoning of "
            "a turn first, then its text, then its tool calls",
        ),
        (
            [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "r"}],
            "messages[1]: 'content[1]': reasoning after text, but a chat template writes the reasoning of a "
            "turn first, then its text, then its tool calls",
        ),
        (
            [{"type": "redacted_thinking", "data": "x"}],
            "messages[1]: 'content[0]' must be a text part, got a part of type 'redacted_thinking'",
        ),
        (
            [{"type": "image_url", "value": "1.jpg"}],
            "messages[1]: 'content[0]' must be a text part, got a part of type 'image_url'",
        ),
        (
            [{"type": "tool_call", "value": "f(1)"}],
            "messages[1]: 'content[0]': broken JSON: Expecting value (column 1)",
        ),
        (
            [{"type": "tool_call", "value": [1]}],
            "messages[1]: 'content[0]': the value of a tool_call must be an object, got a list",
        ),
        ([{"type": "reasoning"}], "messages[1]: 'content[0]' must be a reasoning part, got one without text"),
    ],
)
def test_parts_that_cannot_be_trained_on_as_they_stand_are_errors(content, reason):
    assert error_of(messages=[USER, {"role": "assistant", "content": content}]) == reason


def test_reasoning_in_parts_and_in_a_key_is_an_error():
    turn = {"role": "assistant", "content": [{"type": "reasoning", "value": "r"}], "reasoning_content": "r2"}
    assert error_of(messages=[USER, turn]) == "messages[1]: reasoning in 'content' and in 'reasoning_content'"


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_tool_calls_as_turns_of_their_own_join_the_assistant_turn_before_them(key):
    call = json.dumps({"name": "f", "parameters": {"x": 1}})
    conversation = parse(**{
        key: [
            USER,
            {"role": "assistant", "content": "see"},
            {"role": "tool_call", "content": call},
            {"role": "tool_call", "content": call},
            {"role": "tool_response", "content": "1"},
            {"role": "function_call", "content": call},
            {"role": "function", "name": "f", "content": "1"},
            ANSWER,
        ]
    })  # fmt: skip
    assert conversation.messages == [
        USER,
        {"role": "assistant", "content": "see", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "content": "1"},
        ANSWER,
    ]


def test_tool_calls_in_tags_are_left_as_they_are():
    text = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    conversation = parse(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": text}])
    assert conversation.messages == [USER, {"role": "assistant", "content": text}]


def test_bare_tool_definitions_get_the_form_that_chat_templates_expect():
    bare = TOOL["function"]
    for columns in (
        {"tools": [bare]},
        {"tools": json.dumps([bare])},
        {"functions": [bare]},
        {"tools": [TOOL]},
    ):
        assert parse(messages=[USER, ANSWER], **columns).tools == [TOOL]
    message = error_of(messages=[USER, ANSWER], tools=[TOOL], functions=[bare])
    assert message == "'tools' and 'functions' both define tools"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"loss": "no"}, "messages[1]: 'loss' must be true or false, got 'no'"),
        ({"loss": True, "weight": 0}, "messages[1]: 'loss' is true but 'weight' is 0"),
    ],
)
def test_keys_about_the_loss_of_a_turn_that_are_wrong_are_errors(fields, reason):
    assert error_of(messages=[USER, {**ANSWER, **fields}]) == reason


@pytest.mark.parametrize(
    "fields", [{"loss": False}, {"loss_weight": 0.0}, {"loss_scale": 0}, {"train": False}]
)
def test_turns_without_loss_are_context(fields):
    conversation = parse(messages=[USER, {**ANSWER, **fields}, USER, {**ANSWER, "loss_weight": 1.0}])
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]
    assert conversation.supervised == (False, False, False, True)


def test_a_pair_may_say_whether_its_answer_is_trained_on():
    pairs = [{"input": "q", "output": "a", "output_with_loss": False}, {"input": "q", "output": "a"}]
    conversation = parse(conversation=pairs)
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]
    assert conversation.supervised == (False, False, False, True)
