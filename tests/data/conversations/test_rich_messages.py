"""Tools, tool calls, reasoning, content parts and unsupervised turns with different chat templates."""

import json
from datetime import date

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from tests.data.templates.chat_templates import (
    FAMILIES,
    Supervised,
    call,
    encoder_for,
    error_of,
    examples_in,
    expected,
    plain,
    read,
    sequences,
    talk,
    tool,
    turn,
)

IM_USER, IM_ASSISTANT, IM_END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
ASKED = turn("user", "q")
EMPTY_SYSTEM = turn("system", "")
REASONED = turn("assistant", "a", reasoning_content="r")
TOOL = '{"type": "function", "function": {"name": "f", "description": "d", "parameters": '
TOOL += '{"type": "object", "properties": {}}}}'


def called(*names: str, content: str = "", **fields: str) -> dict:
    return turn("assistant", content, tool_calls=[call(name, {"x": 1, "é": "ü"}, **fields) for name in names])


def check(encoder: ChatEncoder, conversation, *expected_texts: tuple[str, ...]) -> None:
    assert sequences(encoder, conversation) == [
        expected(encoder.tokenizer, *texts) for texts in expected_texts
    ]


def test_tool_calls_in_tags_and_results_merged_into_one_user_turn(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "hermes")
    messages = [
        ASKED, called("f", "g", content="Let me see"), turn("tool", "1"), turn("tool", ""),
        turn("assistant", "done"),
    ]  # fmt: skip
    written = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": 1, "é": "ü"}}}}\n</tool_call>' for name in "fg"
    ]
    check(
        encoder,
        talk(messages, tools=[tool("f")]),
        (
            f"<|im_start|>system\nBe good.\n<tools>\n{TOOL}\n</tools>{IM_END}\n{IM_USER}q{IM_END}\n"
            + IM_ASSISTANT,
            Supervised("Let me see\n" + "\n".join(written) + IM_END),
            f"\n{IM_USER}<tool_response>\n1\n</tool_response>\n<tool_response>\n\n</tool_response>{IM_END}\n"
            + IM_ASSISTANT,
            Supervised("done" + IM_END),
            "\n",
        ),
    )


def test_tool_call_as_json_and_date_in_the_system_turn(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "llama", {"date_string": "26 Jul 2024"})

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    check(
        encoder,
        talk([ASKED, called("f"), turn("tool", '{"a": 1}'), turn("assistant", " two ")]),
        (
            f"<bos>{header('system')}Today Date: 26 Jul 2024\n\n<|eot_id|>{header('user')}q<|eot_id|>"
            + header("assistant"),
            Supervised('{"name": "f", "parameters": {"x": 1, "é": "ü"}}<|eot_id|>'),
            header("ipython") + '"{\\"a\\": 1}"<|eot_id|>' + header("assistant"),
            Supervised("two<|eot_id|>"),
        ),
    )
    twice = error_of(encoder, talk([ASKED, called("f", "g")]))
    assert str(twice).endswith("This model only supports single tool-calls at once!")


def test_tool_calls_with_ids_and_tools_before_the_last_user_turn(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "mistral")
    written = '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1, "é": "ü"}, "id": "abcdefghi"}]</s>'
    messages = [
        turn("system", "S"), ASKED, called("f", id="abcdefghi"), turn("tool", "3", tool_call_id="abcdefghi"),
        turn("assistant", "a"),
    ]  # fmt: skip
    start = f"<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][AVAILABLE_TOOLS][{TOOL}][/AVAILABLE_TOOLS][INST]q[/INST]"
    check(
        encoder,
        talk(messages, tools=[tool("f")]),
        (
            start,
            Supervised(written),
            '[TOOL_RESULTS]{"content": 3, "call_id": "abcdefghi"}[/TOOL_RESULTS]',
            Supervised("a</s>"),
        ),
    )
    # With a second question the tools move behind the first answer, so that answer gets its own sequence.
    longer = talk([*messages, turn("user", "r"), turn("assistant", "b")], tools=[tool("f")])
    first, second = sequences(encoder, longer)
    assert first == sequences(encoder, talk(messages, tools=[tool("f")]))[0]
    assert [label for label in second[1] if label != -100] == encoder.text_tokenizer.token_ids("b</s>")
    error = error_of(encoder, talk([ASKED, called("f")]))
    assert str(error) == "the chat template refuses the conversation: ids have length 9!"


@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_are_passed_in_the_type_that_the_template_expects(tokenizer_json, as_text):
    arguments = '{"x": 1, "é": "ü"}'
    value = arguments if as_text else {"x": 1, "é": "ü"}
    row = read([ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": value}]}])
    written = {
        "string_arguments": ("<s><|user|>q<|assistant|>", f"function f\n```json\n{arguments}\n```</s>", ""),
        "xml_arguments": (
            f"{IM_USER}q{IM_END}\n{IM_ASSISTANT}",
            "<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value><arg_key>é</arg_key><arg_value>ü"
            f"</arg_value></tool_call>{IM_END}",
            "\n",
        ),
    }
    for family, (prompt, answer, tail) in written.items():
        check(encoder_for(tokenizer_json, family), row, (prompt, Supervised(answer), tail))


def test_tool_calls_and_tools_that_the_template_drops_are_errors(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "chatml")
    error = error_of(encoder, talk([ASKED, called("f", content="x")]))
    assert str(error).startswith("messages[1]: the chat template does not render its tool calls; ")
    error = error_of(encoder, talk([ASKED, turn("assistant", "a")], tools=[tool("f")]))
    assert str(error).startswith("the chat template does not render 'tools'; ")
    named = talk([ASKED, called("f", content="I call f with x and é.")])
    assert "does not render its tool calls" in str(error_of(encoder, named))
    messages = [ASKED, called("f", content="x"), turn("user", "r"), turn("assistant", "a")]
    untrained = talk(messages, [0, 0, 0, 1])
    assert "does not render its tool calls" in str(error_of(encoder, untrained))


def test_reasoning_of_each_turn_is_supervised_in_a_separate_sequence(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "thinks")
    messages = [
        ASKED, turn("assistant", "one", reasoning_content="hm"), turn("user", "r"),
        turn("assistant", "two", reasoning_content="oh"),
    ]  # fmt: skip
    start = f"{IM_USER}q{IM_END}\n{IM_ASSISTANT}"
    check(
        encoder,
        talk(messages),
        (start, Supervised(f"<think>\nhm\n</think>\n\none{IM_END}"), "\n"),
        (
            f"{start}one{IM_END}\n{IM_USER}r{IM_END}\n{IM_ASSISTANT}",
            Supervised(f"<think>\noh\n</think>\n\ntwo{IM_END}"),
            "\n",
        ),
    )


def test_empty_thinking_block_belongs_to_the_prompt(tokenizer_json):
    start, empty = f"{IM_USER}q{IM_END}\n{IM_ASSISTANT}", "<think>\n\n</think>\n\n"
    conversation = talk([ASKED, turn("assistant", "one")])
    off = talk([ASKED, turn("assistant", "one")], variables={"enable_thinking": False})
    check(
        encoder_for(tokenizer_json, "thinks"), conversation, (start, Supervised(f"{empty}one{IM_END}"), "\n")
    )
    check(encoder_for(tokenizer_json, "thinks"), off, (start + empty, Supervised(f"one{IM_END}"), "\n"))
    everywhere = encoder_for(tokenizer_json, "thinks", {"enable_thinking": False})
    check(everywhere, conversation, (start + empty, Supervised(f"one{IM_END}"), "\n"))
    on = talk([ASKED, turn("assistant", "one")], variables={"enable_thinking": True})
    check(everywhere, on, (start, Supervised(f"{empty}one{IM_END}"), "\n"))


def test_reasoning_between_header_and_answer_without_end_of_turn_tokens(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "nothink")
    messages = [ASKED, turn("assistant", "one", reasoning_content="hm")]
    start = "[gMASK]<sop><|user|>\nq"
    check(
        encoder, talk(messages), (f"{start}<|assistant|>", Supervised("\n<think>hm</think>\none<|user|>"))
    )  # fmt: skip
    off = talk([ASKED, turn("assistant", "one")], variables={"enable_thinking": False})
    check(encoder, off, (f"{start}/nothink<|assistant|>\n<think></think>", Supervised("\none<|user|>")))


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_reasoning_in_a_channel_under_any_of_its_keys(tokenizer_json, name):
    encoder = encoder_for(tokenizer_json, "analysis")
    start = "<|start|>user<|message|>q<|end|><|start|>assistant"
    check(
        encoder,
        talk([ASKED, turn("assistant", "one", **{name: "hm"})]),
        (
            start,
            Supervised(
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
                "one<|return|>"
            ),
        ),
    )


def test_think_tag_of_the_generation_prompt_is_not_supervised(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "opens_and_keeps_thinking")
    messages = [ASKED, turn("assistant", "<think>\nhm</think>one"), turn("user", "r")]
    messages.append(turn("assistant", "<think>\noh</think>two"))
    check(
        encoder,
        talk(messages),
        ("<bos><|user|>q<|assistant|><think>\n", Supervised("hm</think>one<|end|>")),
        (
            "<bos><|user|>q<|assistant|>one<|end|><|user|>r<|assistant|><think>\n",
            Supervised("oh</think>two<|end|>"),
        ),
    )


def test_reasoning_that_the_template_drops_is_an_error(tokenizer_json):
    conversation = talk([ASKED, turn("assistant", "one", reasoning_content="hm")])
    error = error_of(encoder_for(tokenizer_json, "chatml"), conversation)
    assert str(error) == (
        "messages[1]: the chat template does not render its reasoning; put it into 'content', or pass a "
        "template that renders it (--chat_template)"
    )
    inside = talk([ASKED, turn("assistant", "<think>\nhm\n</think>one")])
    error = error_of(encoder_for(tokenizer_json, "opens_thinking"), inside)
    assert "removes the reasoning before </think> from 'content'" in str(error)


def test_dropped_reasoning_is_detected_even_if_its_words_occur_elsewhere(tokenizer_json):
    answer = turn("assistant", "The answer is 4", reasoning_content="4")
    error = error_of(encoder_for(tokenizer_json, "chatml"), talk([ASKED, answer]))
    assert "does not render its reasoning" in str(error)
    inside = turn("assistant", "<think>one</think>one")
    error = error_of(encoder_for(tokenizer_json, "opens_thinking"), talk([ASKED, inside]))
    assert "removes the reasoning before </think>" in str(error)
    encoder = encoder_for(tokenizer_json, "thinks")
    ((ids, _),) = sequences(encoder, talk([ASKED, answer]))
    assert "<think>\n4\n</think>\n\nThe answer is 4" in encoder.tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["llama", "analysis"])
def test_content_dropped_next_to_tool_calls_is_an_error(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family)
    error = error_of(encoder, talk([ASKED, called("f", content="f")]))
    assert str(error).startswith(
        "messages[1]: the chat template does not render the 'content' of a turn that also has tool"
    )
    assert sequences(encoder, talk([ASKED, called("f")]))
    # A template that writes both keeps both.
    assert sequences(encoder_for(tokenizer_json, "hermes"), talk([ASKED, called("f", content="f")]))


@pytest.mark.parametrize("family", ["thinks", "nothink"])
def test_reasoning_after_a_prompt_that_closes_thinking_is_an_error(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family, {"enable_thinking": False})
    error = error_of(encoder, talk([ASKED, turn("assistant", "one", reasoning_content="because")]))
    assert "closes the thinking block in the prompt already" in str(error)
    assert sequences(encoder, talk([ASKED, turn("assistant", "one")]))


def test_two_assistant_turns_in_a_row_unroll_without_an_end_of_turn_token(tokenizer_json):
    twice = talk([ASKED, turn("assistant", "one"), turn("assistant", "two")])
    start = "[gMASK]<sop><|user|>\nq<|assistant|>\n"
    check(
        encoder_for(tokenizer_json, "next_header_ends"),
        twice,
        (start, Supervised("one<|user|>")),
        (f"{start}one<|assistant|>\n", Supervised("two<|user|>")),
    )
    assert sequences(encoder_for(tokenizer_json, "no_end"), twice)  # it ends no turn at all


def test_date_is_fixed_unless_one_is_passed(tokenizer_json):
    conversation = talk([ASKED, turn("assistant", "one")])
    for today, shown in ((None, "26 Jul 2024"), (date(2031, 2, 3), "03 Feb 2031")):
        encoder = encoder_for(tokenizer_json, "llama")
        if today is not None:
            encoder = ChatEncoder(encoder.tokenizer, today=today)
        ((ids, _),) = sequences(encoder, conversation)
        assert f"Today Date: {shown}" in encoder.tokenizer.decode(ids)


def test_content_is_passed_as_parts_to_templates_that_expect_parts(tokenizer_json):
    row = read([ASKED, {"role": "assistant", "content": ["a", {"type": "text", "text": "b"}]}])
    pieces = (f"{IM_USER}q{IM_END}\n{IM_ASSISTANT}", Supervised(f"ab{IM_END}"), "\n")
    for family in ("parts", "chatml"):
        check(encoder_for(tokenizer_json, family), row, pieces)


@pytest.mark.parametrize("family", ["chatml", "tagged", "tagged_wide"])
@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_unsupervised_assistant_turn_is_context(tokenizer_json, family, mark):
    row = read([ASKED, {**turn("assistant", "one"), **mark}, turn("user", "r"), turn("assistant", "two")])
    encoder = encoder_for(tokenizer_json, family)
    check(
        encoder,
        row,
        (
            f"{IM_USER}q{IM_END}\n{IM_ASSISTANT}one{IM_END}\n{IM_USER}r{IM_END}\n{IM_ASSISTANT}",
            Supervised(f"two{IM_END}"),
            "\n",
        ),
    )


def test_unsupervised_turns_of_rewritten_history_make_no_sequence(tokenizer_json):
    messages = [
        ASKED, turn("assistant", "one", reasoning_content="hm"), turn("user", "r"),
        turn("assistant", "two", reasoning_content="oh"),
    ]  # fmt: skip
    encoder = encoder_for(tokenizer_json, "thinks")
    assert sequences(encoder, talk(messages, [0, 0, 0, 1])) == sequences(encoder, talk(messages))[1:]
    assert sequences(encoder, talk(messages).last_turn_only()) == sequences(encoder, talk(messages))[1:]


PLAIN = [
    turn("user", "What is two?"), turn("assistant", "Two is four"), turn("user", "b"), turn("assistant", "c")
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_the_rendering_of_transformers(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family, {"date_string": "1 May"})
    messages = PLAIN
    if encoder.template.roles_in_parts:
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} for message in PLAIN
        ]
    (text,), _ = render_jinja_template(
        [messages], chat_template=encoder.template.source, date_string="1 May",
        **encoder.template.special_tokens,
    )  # fmt: skip
    rendered = encoder.renderer.render(talk(PLAIN))[-1]
    (prompt,), _ = render_jinja_template(
        [messages[:-1]], chat_template=encoder.template.source, date_string="1 May",
        add_generation_prompt=True, **encoder.template.special_tokens,
    )  # fmt: skip
    start, end = rendered.spans[-1]
    assert rendered.text[:start] == prompt
    # The token that stops generation may be the first one of the next turn.
    assert text.rstrip().endswith(
        (rendered.text[start:].rstrip(), rendered.text[start:end].rpartition("<")[0])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_supervised_once_and_no_question_is(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family, {"date_string": "1 May"})
    supervised = []
    for example in examples_in(encoder, talk(PLAIN)):
        ids, labels = plain(example)
        assert len(ids) == len(labels)
        supervised.append(encoder.tokenizer.decode([label for label in labels if label != -100]))
    words = "".join(supervised)
    assert words.count("Two is four") == 1 and words.count("c") >= 1 and "What" not in words


def test_conversation_that_unrolls_into_too_much_text_is_an_error(tokenizer_json, monkeypatch):
    """A template that drops earlier reasoning makes a sequence of each turn."""
    monkeypatch.setattr("dft.data.templates.encoder.MAX_RENDERED_CHARACTERS", 1000)
    encoder = encoder_for(tokenizer_json, "forgets_reasoning")
    answer = turn("assistant", f"<think>{'hm ' * 40}</think>one")
    assert len(sequences(encoder, talk([ASKED, answer, ASKED, answer]))) == 2
    error = error_of(encoder, talk([ASKED, answer] * 6))
    assert str(error).startswith("the chat template turns the conversation into 6 sequences with ")
    assert error.kind == "too much text once rendered"


def test_batch_size_of_tokenization_does_not_change_the_sequences(tokenizer_json, monkeypatch):
    encoder = encoder_for(tokenizer_json, "chatml")
    conversations = [talk([ASKED, turn("assistant", "one " * count)]) for count in range(1, 9)]
    expected = [[plain(example) for example in group] for group in encoder.encode(conversations)]
    monkeypatch.setattr("dft.data.templates.encoder.BATCH_TEXT", 60)
    assert [[plain(example) for example in group] for group in encoder.encode(conversations)] == expected


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"messages": [EMPTY_SYSTEM, ASKED, EMPTY_SYSTEM, REASONED]}, "messages[3]"),
        ({"messages": [ASKED, REASONED], "system": "s"}, "messages[1]"),
        ({"conversations": [{"from": "human", "value": "q"}, REASONED]}, "conversations[1]"),
        ({"prompt": [EMPTY_SYSTEM, ASKED], "completion": [REASONED]}, "completion[0]"),
    ],
)
def test_error_of_the_chat_template_names_the_place_in_the_row(encoder, row, place):
    (error,) = encoder.encode([parse_conversation(json.dumps(row).encode())])
    assert isinstance(error, BadLine)
    assert str(error).startswith(f"{place}: the chat template does not render its reasoning; ")
