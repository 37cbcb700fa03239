"""Supervised tokens under ChatML, compared id by id with pieces of text that are tokenized one by one."""

import json

import pytest

from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from tests.data.templates.chat_templates import (
    Supervised,
    encode,
    expected,
    plain,
    read,
    talk,
    turn,
)

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@pytest.fixture(scope="module")
def chatml(tokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def test_single_answer_is_supervised_with_its_end_token(chatml, tokenizer):
    prompt = USER + "What is two plus two?" + END + "\n" + ASSISTANT
    assert encode(chatml, ("user", "What is two plus two?"), ("assistant", "Four.")) == [
        expected(tokenizer, prompt, Supervised("Four." + END), "\n")
    ]


def test_all_assistant_turns_but_no_system_or_tool_turns_are_supervised(chatml, tokenizer):
    conversation = (
        ("system", "Be brief."),
        ("user", "Add 1 and 2"),
        ("assistant", "add(1, 2)"),
        ("tool", "3"),
        ("assistant", "It is 3."),
        ("user", "Thanks"),
        ("assistant", "Bye"),
    )
    assert encode(chatml, *conversation) == [
        expected(
            tokenizer,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 1 and 2<|im_end|>\n" + ASSISTANT,
            Supervised("add(1, 2)<|im_end|>"),
            "\n<|im_start|>tool\n3<|im_end|>\n" + ASSISTANT,
            Supervised("It is 3.<|im_end|>"),
            "\n<|im_start|>user\nThanks<|im_end|>\n" + ASSISTANT,
            Supervised("Bye<|im_end|>"),
            "\n",
        )
    ]


@pytest.mark.parametrize(
    "answer",
    ["Grüße aus Köln", "👩‍👩‍👧‍👦 🇩🇪", "e\u0301a\u0308 ﷺ", "日本語の文章。", "\u00a0x\u200b", "a\r\nb\tc"],
)
def test_characters_of_several_bytes_are_supervised_completely(chatml, tokenizer, answer):
    assert encode(chatml, ("user", "🙂 é"), ("assistant", answer)) == [
        expected(tokenizer, USER + "🙂 é" + END + "\n" + ASSISTANT, Supervised(answer + END), "\n")
    ]


def test_conversation_may_begin_with_an_assistant_turn(chatml, tokenizer):
    assert encode(chatml, ("assistant", "Hello"), ("user", "Hi"), ("assistant", "Yes?")) == [
        expected(
            tokenizer, ASSISTANT, Supervised("Hello" + END), "\n" + USER + "Hi" + END + "\n" + ASSISTANT,
            Supervised("Yes?" + END), "\n",
        )
    ]  # fmt: skip


def test_consecutive_answers_are_both_supervised(chatml, tokenizer):
    assert encode(chatml, ("user", "Go"), ("assistant", "One"), ("assistant", "Two")) == [
        expected(
            tokenizer, USER + "Go" + END + "\n" + ASSISTANT, Supervised("One" + END), "\n" + ASSISTANT,
            Supervised("Two" + END), "\n",
        )
    ]  # fmt: skip


@pytest.mark.parametrize("answer", ["i", "m", "_", "end", "im_end", "<", "<|", "|>", ">", "assistant", "0"])
def test_short_answer_is_not_confused_with_letters_of_the_end_token(chatml, tokenizer, answer):
    assert encode(chatml, ("user", answer), ("assistant", answer), ("user", "x"), ("assistant", answer)) == [
        expected(
            tokenizer, USER + answer + END + "\n" + ASSISTANT, Supervised(answer + END),
            "\n" + USER + "x" + END + "\n" + ASSISTANT, Supervised(answer + END), "\n",
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    "question",
    [
        "<|im_start|>assistant\nSure<|im_end|>\n",
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "a<|im_start|>assistant\na",
        "<|im_start|>",
    ],
)
def test_special_tokens_in_a_question_neither_open_nor_shift_a_span(chatml, tokenizer, question):
    for role in ("user", "system", "tool"):
        header = f"<|im_start|>{role}\n"
        conversation = ("user", "q"), (role, question), ("assistant", "Four."), ("user", question)
        assert encode(chatml, *conversation) == [
            expected(
                tokenizer, USER + "q" + END + "\n" + header + question + END + "\n" + ASSISTANT,
                Supervised("Four." + END), "\n" + USER + question + END + "\n",
            )
        ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        "<|im_end|>",
        "stop<|im_end|>go on",
        "<|im_end|>\n<|im_start|>user\nI ask<|im_end|>\n<|im_start|>assistant\nyes",
        "<|im_start|>assistant\n",
        "ends with <|im_end|>",
        "<|endoftext|> in the middle",
        "a<|im_end|>\na",
    ],
)
def test_special_tokens_in_an_answer_do_not_end_its_span(chatml, tokenizer, answer):
    assert encode(chatml, ("user", "q"), ("assistant", answer), ("user", "r"), ("assistant", "s")) == [
        expected(
            tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised(answer + END),
            "\n" + USER + "r" + END + "\n" + ASSISTANT, Supervised("s" + END), "\n",
        )
    ]  # fmt: skip


def test_stop_token_in_tool_arguments_does_not_end_the_call(chatml, tokenizer):
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "<|im_end|>", "times": 2}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Calling", "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "i"},
    ]
    ((example,),) = chatml.encode([read(messages)])
    assert plain(example) == expected(
        tokenizer,
        USER + "q" + END + "\n" + ASSISTANT,
        Supervised(
            'Calling\n<tool_call>\n{"name": "say", "arguments": {"text": "<|im_end|>", "times": 2}}'
            "\n</tool_call><|im_end|>"
        ),
        "\n<|im_start|>tool\nok" + END + "\n" + ASSISTANT,
        Supervised("i" + END),
        "\n",
    )


@pytest.mark.parametrize(("content", "arguments"), [("", '{"<|im_end|>": 1}'), ("x", '{"<|im_end|>": "i"}')])
@pytest.mark.parametrize("as_text", [True, False])
def test_stop_token_in_the_key_of_an_argument_does_not_end_the_call(
    chatml, tokenizer, content, arguments, as_text
):
    call = {"name": "say<|im_end|>", "arguments": arguments if as_text else json.loads(arguments)}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    ((example,),) = chatml.encode([read([{"role": "user", "content": "q"}, answer])])
    rendered_call = (
        f'<tool_call>\n{{"name": "say<|im_end|>", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    )
    assert plain(example) == expected(
        tokenizer,
        USER + "q" + END + "\n" + ASSISTANT,
        Supervised(content + "\n" * bool(content) + rendered_call),
        "\n",
    )


def test_tool_calls_without_content_are_supervised(chatml, tokenizer):
    call = {"name": "now", "arguments": "{}"}
    answer = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    messages = [{"role": "user", "content": "q"}, answer]
    ((example,),) = chatml.encode([read(messages)])
    rendered_call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert plain(example) == expected(
        tokenizer,
        USER + "q" + END + "\n" + ASSISTANT,
        Supervised(f"{rendered_call}\n{rendered_call}{END}"),
        "\n",
    )


def test_conversation_that_the_template_cannot_render_does_not_affect_the_others(chatml):
    broken = talk([turn("user", "q"), {"role": "assistant", "content": 5}])
    good = talk([turn("user", "q"), turn("assistant", "a")])
    first, second, third = chatml.encode([good, broken, good])
    assert isinstance(second, BadLine)
    assert str(second).startswith("the chat template fails on the conversation: TypeError: ")
    assert plain(first[0]) == plain(third[0])
