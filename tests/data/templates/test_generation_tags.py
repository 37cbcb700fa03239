"""{% generation %} blocks are compared with what the model generates, and used only if asked for."""

import pytest

from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.generation_tags import TAGS_DIFFER
from tests.data.templates.chat_templates import (
    TAGGED,
    TAGGED_WIDE,
    Supervised,
    encode,
    encoder_of,
    expected,
    talk,
    turn,
)

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
CONVERSATION = ("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "second")
# Only the content is marked, not the end-of-turn token.
TAGGED_CONTENT = TAGGED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                                "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}")  # fmt: skip
# The header that a variable of the row changes is marked as well.
TAGGED_HEADER = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- generation %}{{ '<|im_start|>assistant\\n' }}
{{- '</think>' if enable_thinking is false else '<think>' + (m.reasoning_content or '') + '</think>' }}
{{- m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{{- '</think>' if enable_thinking is false else '<think>' }}{% endif %}"""


def remarks(encoder: ChatEncoder, *messages: tuple[str, str]) -> dict[str, str]:
    (group,) = encoder.sequences([talk([turn(*message) for message in messages])])
    assert not isinstance(group, BadLine)
    return {kind: example for rendering, _ in group for kind, example in rendering.remarks.items()}


@pytest.mark.parametrize("template", [TAGGED, TAGGED_WIDE, TAGGED_CONTENT])
def test_blocks_do_not_change_what_is_supervised(tokenizer_json, template):
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    assert encode(encoder, *CONVERSATION) == [
        expected(
            encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised("first" + END),
            "\n" + USER + "r" + END + "\n" + ASSISTANT, Supervised("second" + END), "\n",
        )
    ]  # fmt: skip


def test_blocks_that_mark_other_text_are_reported_with_an_example(tokenizer_json):
    assert remarks(encoder_of(tokenizer_json, TAGGED, eos_token=END), *CONVERSATION) == {}
    assert remarks(encoder_of(tokenizer_json, TAGGED_CONTENT, eos_token=END), *CONVERSATION) == {
        TAGS_DIFFER: "messages[3]: the blocks mark 'second', the model generates 'second<|im_end|>'"
    }


def test_used_blocks_narrow_what_is_supervised(tokenizer_json):
    tokenizer = encoder_of(tokenizer_json, TAGGED_CONTENT, eos_token=END).tokenizer
    encoder = ChatEncoder(tokenizer, use_generation_tags=True)
    assert encode(encoder, *CONVERSATION) == [
        expected(
            tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised("first"),
            END + "\n" + USER + "r" + END + "\n" + ASSISTANT, Supervised("second"), END + "\n",
        )
    ]  # fmt: skip
    ((example,),) = encoder.encode([talk([turn(*message) for message in CONVERSATION])])
    assert example.endings == (None, None)
    assert remarks(encoder, *CONVERSATION) == {}


def test_used_blocks_never_supervise_the_header(tokenizer_json):
    tokenizer = encoder_of(tokenizer_json, TAGGED_WIDE, eos_token=END).tokenizer
    (row,) = encode(ChatEncoder(tokenizer, use_generation_tags=True), *CONVERSATION)
    assert row == encode(ChatEncoder(tokenizer), *CONVERSATION)[0]


def test_block_with_a_header_that_a_variable_changes_is_compared_with_the_prompt_of_the_row(tokenizer_json):
    encoder = encoder_of(tokenizer_json, TAGGED_HEADER, eos_token=END)
    conversation = talk([turn("user", "q"), turn("assistant", "a")], variables={"enable_thinking": False})
    ((sequence,),) = encoder.sequences([conversation])
    rendering, _ = sequence
    (span,) = rendering.spans
    assert rendering.text[: span[0]] == USER + "q" + END + "\n" + ASSISTANT + "</think>"
    assert rendering.text[slice(*span)] == "a" + END


def test_used_blocks_that_mark_nothing_of_a_turn_are_an_error(tokenizer_json):
    template = TAGGED.replace(
        "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"
    )
    template = template.replace(
        "{%- if m.role == 'assistant' %}", "{%- if m.role == 'assistant' and m.content != 'x' %}"
    )
    encoder = ChatEncoder(
        encoder_of(tokenizer_json, template, eos_token=END).tokenizer, use_generation_tags=True
    )
    (error,) = encoder.encode([talk([turn("user", "q"), turn("assistant", "x")])])
    assert isinstance(error, BadLine)
    assert str(error) == (
        "messages[1]: no {% generation %} block of the chat template marks any of this turn; leave out "
        "--use_generation_tags, or mark it in the template"
    )
