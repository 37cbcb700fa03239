"""Rows that say two things at once, or hold more than is read, are errors and never guessed."""

import json

import pytest

from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.turns import MEDIA
from tests.data.conversations.parsing import error_of, parse

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
TALK = {"messages": [USER, ANSWER]}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
TOOLS_PART = {"type": "tools", "value": json.dumps([FUNCTION])}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "1"}


def test_tools_in_a_part_are_read_in_every_form_and_from_json_text():
    system = {"role": "system", "content": [TOOLS_PART, {"type": "text", "value": "s"}]}
    rows = [
        {"messages": [system, USER, ANSWER]},
        {"messages": json.dumps([system, USER, ANSWER])},
        {"conversations": [system, USER, ANSWER]},
        {"conversation": [system, USER, ANSWER]},
        {"prompt": [system, USER], "completion": [ANSWER]},
    ]
    for row in rows:
        conversation = parse(row)
        assert conversation.messages == [SYSTEM, USER, ANSWER]
        assert conversation.tools == [TOOL]


def test_tools_in_two_places_are_an_error():
    only_tools = {"role": "system", "content": [TOOLS_PART]}
    question = {"role": "user", "content": [TOOLS_PART, {"type": "text", "text": "q"}]}
    assert parse({"messages": [only_tools, USER, ANSWER]}).tools == [TOOL]
    assert error_of({"messages": [only_tools, question, ANSWER]}) == (
        "the part of type 'tools' of messages[0] and the part of type 'tools' of messages[1] both define "
        "tools"
    )
    assert error_of({"messages": [only_tools, USER, ANSWER], "tools": [TOOL]}) == (
        "'tools' and the part of type 'tools' of messages[0] both define tools"
    )
    twice = {"role": "system", "content": [TOOLS_PART, TOOLS_PART]}
    assert error_of({"messages": [twice, USER, ANSWER]}) == (
        "messages[0]: 'content[1]': a second part of type 'tools'"
    )


@pytest.mark.parametrize(
    "definition",
    [
        FUNCTION,
        {"type": "function", **FUNCTION},
        {"name": "f", "input_schema": {"type": "object"}},
        {"type": "custom", "name": "f", "input_schema": {"type": "object"}},
        TOOL,
    ],
)
def test_tool_definitions_of_every_api_are_put_into_the_form_that_templates_expect(definition):
    assert parse({**TALK, "tools": [definition]}).tools == [TOOL]


def test_tool_definitions_that_are_no_functions_are_left_as_they_are():
    definition = {"type": "web_search", "name": "search"}
    assert parse({**TALK, "tools": [definition]}).tools == [definition]


def test_tool_results_stand_in_front_of_the_text_of_a_user_turn():
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]}
    text = {"type": "text", "text": "q"}
    read = parse({"messages": [USER, call, {"role": "user", "content": [RESULT, text]}, ANSWER]}).messages
    assert read[2:4] == [{"role": "tool", "content": "1", "tool_call_id": "t1"}, USER]
    failed = {"role": "user", "content": [{**RESULT, "is_error": True}]}
    assert parse({"messages": [USER, call, failed, ANSWER]}).messages[2]["is_error"] is True
    assert error_of({"messages": [USER, call, {"role": "user", "content": [text, RESULT]}, ANSWER]}) == (
        "messages[2]: a tool_result behind other parts; results are read as turns of their own in front of "
        "the text"
    )
    assert error_of({"messages": [USER, {"role": "assistant", "content": [RESULT, text]}]}) == (
        "messages[1]: a tool_result outside of a user turn"
    )


@pytest.mark.parametrize("row", [{"query": ["a", "b"], "response": "x"}, {"query": "a", "response": ["x"]}])
def test_the_texts_of_query_and_response_are_strings(row):
    name = next(key for key, value in row.items() if isinstance(value, list))
    assert error_of(row) == f"'{name}' must be a string, got a list"


@pytest.mark.parametrize("column", ["train", "loss"])
def test_a_row_that_is_switched_off_is_refused(column):
    for value, shown in ((False, "false"), ("False", "'False'")):  # the cells of .csv files are texts
        row = {**TALK, column: value}
        assert error_of(row) == (
            f"'{column}' is {shown}, so the row is not to be trained on; --keep_rows {column}=true leaves "
            f"such rows out, --ignore_columns {column} trains on them"
        )
        assert parse(row, ignored=(column,)).supervised == (False, True)
    for value in (True, 0.25, 0, None):
        assert parse({**TALK, column: value}).messages == TALK["messages"]


def test_a_column_that_selects_parts_of_a_row_is_refused():
    assert error_of({**TALK, "loss_mask": [0, 1]}) == (
        "'loss_mask' selects parts of a row, but only whole messages can be selected, with 'train' in the "
        "message; --ignore_columns loss_mask trains on all answers"
    )


@pytest.mark.parametrize("value", [False, 0, 0.0, "False", "0", "no"])
def test_an_answer_that_is_not_correct_is_refused_however_that_is_written(value):
    assert "it says whether an answer is good" in error_of({**TALK, "is_correct": value})


@pytest.mark.parametrize("value", [True, 1, "true", "yes"])
def test_an_answer_that_is_correct_is_trained_on(value):
    assert parse({**TALK, "is_correct": value}).messages == TALK["messages"]


@pytest.mark.parametrize("column", ["image_urls", "image_paths", "video_paths", "audio_url"])
def test_media_under_other_names_are_refused(column):
    assert f"'{column}' holds {MEDIA[column]}" in error_of({**TALK, column: ["x"]})
    for nothing in ("[]", "{}", [], ""):  # the cells of .csv files are texts
        assert parse({**TALK, column: nothing}).messages == TALK["messages"]


def test_a_renamed_column_of_images_is_refused():
    reason = error_of({**TALK, "pics": ["x"]}, columns=(("images", "pics"),))
    assert reason.startswith("'pics' holds an image, ")
    assert "--ignore_columns pics trains" in reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, BAD]},
            "'prompt' is not part of the chosen conversation, which has all turns; --ignore_columns prompt "
            "leaves it out",
        ),
        (
            {"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, BAD]},
            "'prompt' is not part of the chosen conversation,",
        ),
        (
            {"messages": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, BAD]},
            "'messages' is not part of the chosen conversation,",
        ),
        (
            {"instruction": "q", "output": "x", "chosen": "a", "rejected": "b"},
            "'output' and 'chosen' are different answers; --ignore_columns output leaves the first one out",
        ),
        (
            {**TALK, "chosen": "a", "rejected": "b"},
            "'messages' ends with an answer, so the chosen one cannot follow it; leave one of them out, with "
            "--ignore_columns",
        ),
        (
            {"prompt": "q", "chosen": "a", "chosen_messages": [USER, ANSWER]},
            "'chosen' and 'chosen_messages' both hold a chosen answer; leave one out with --ignore_columns",
        ),
    ],
)
def test_pairs_of_which_a_part_would_be_dropped_are_errors(row, reason):
    assert error_of(row, use_chosen=True).startswith(reason)


def test_pairs_that_repeat_themselves_are_read():
    rows = [
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": "q", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": [SYSTEM, USER], "rejected": [SYSTEM, USER, BAD],
         "chosen": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, ANSWER]},
        {"system": "s", "instruction": "q", "output": "a", "chosen": "a", "rejected": "b"},
    ]  # fmt: skip
    for row in rows:
        conversation = parse(row, use_chosen=True)
        assert conversation.messages == [SYSTEM, USER, ANSWER]
        assert conversation.supervised == (False, False, True)


def test_text_in_another_encoding_is_named():
    text = json.dumps(TALK)
    hint = "; it looks like UTF-16, which iconv -f UTF-16 -t UTF-8 converts"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        with pytest.raises(BadLine) as caught:
            parse_conversation(text.encode(encoding))
        assert str(caught.value).endswith(hint)
    with pytest.raises(BadLine, match="^broken JSON: the line begins with a byte order mark, as if files"):
        parse_conversation(text.encode("utf-8-sig"))
