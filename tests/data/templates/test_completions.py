"""Starts and ends of turns under templates that render a turn differently once the conversation continues."""

import pytest

from tests.data.templates.chat_templates import (
    Supervised,
    call,
    encode,
    encoder_of,
    error_of,
    expected,
    plain,
    talk,
    tool,
    turn,
)

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
ASKED = turn("user", "q")
CALLED = turn("assistant", tool_calls=[call("f", {"city": "Rome", "days": 2})])

# A trailing instruction after each conversation, calls without an end, and an error without tools.
INSTRUCTION = """{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{{ '<|assistant|>' + m.tool_calls[0].function.name }}
{{- m.tool_calls[0].function.arguments | tojson + '\\n' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{%- else %}{{ '<|system|>Write the action.' }}{% endif %}"""

# The name of the function is repeated in the header of its result.
REPEATS_NAME = """{% set last = namespace(name='') %}{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{% set last.name = m.tool_calls[0].function.name %}
{{- '<|assistant|>' + last.name + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'tool' %}{{ '<|tool|>' + last.name + m.content + '<|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# The system turn is merged into the turn after it, whatever its role (Gemma 2 and derivatives).
MERGES_INTO_NEXT = """{% set system = '' %}{% if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>' + (system if loop.first else '') + m.content + '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# A switch is removed from the text of the user.
SWITCHES = """{% for m in messages %}{{ '<|' + m.role + '|>' }}
{{- m.content | replace('/think', '') + '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# The prompt has a switch in front of the header, the rendering of an answer has none.
SWITCH_IN_PROMPT = """{% for m in messages %}
{{- ' USER: ' + m.content if m.role == 'user' else ' ASSISTANT: ' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ ' /think_off ASSISTANT:' }}{% endif %}"""

# No end token: the next header ends a turn (GLM-4).
NEXT_HEADER = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# White space around the end of a call differs between the last turn and earlier ones.
OTHER_WHITE_SPACE = """{% for m in messages %}{% if m.tool_calls %}
{{- '<|assistant|>' + m.tool_calls[0].function.arguments | tojson + m.tool_calls[0].function.name }}
{{- '<|end|>\\n' if loop.last else '\\n<|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def test_call_before_a_trailing_instruction_has_no_end(tokenizer_json):
    encoder = encoder_of(tokenizer_json, INSTRUCTION, eos_token="<|endoftext|>")
    error = error_of(encoder, talk([ASKED, CALLED], tools=[tool("f")]))
    assert str(error) == (
        "messages[1]: the chat template ends plain turns with <|end|>, but writes "
        '\'", "days": 2}\\n<|system|>Write \' after this one, where generation would not stop; if it '
        "should stop there, add that token to eos_token_id in generation_config.json, otherwise pass another "
        "template (--chat_template) or remove the turn"
    )
    assert error.kind == "a turn without an end-of-turn token"
    ((example,),) = encoder.encode([talk([ASKED, turn("assistant", "a")], tools=[tool("f")])])
    assert plain(example) == expected(
        encoder.tokenizer, f"f{USER}q{END}{ASSISTANT}", Supervised(f"a{END}"), "<|system|>Write the action."
    )


def test_call_ends_before_a_result_that_repeats_its_name(tokenizer_json):
    encoder = encoder_of(tokenizer_json, REPEATS_NAME, "<|call|>", eos_token=END)
    ((example,),) = encoder.encode([talk([ASKED, CALLED, turn("tool", "3"), turn("assistant", "a")])])
    assert plain(example) == expected(
        encoder.tokenizer,
        f"{USER}q{END}{ASSISTANT}",
        Supervised('f{"city": "Rome", "days": 2}<|call|>'),
        f"<|tool|>f3{END}{ASSISTANT}",
        Supervised(f"a{END}"),
    )


def test_call_whose_end_follows_other_white_space_in_history(tokenizer_json):
    encoder = encoder_of(tokenizer_json, OTHER_WHITE_SPACE, eos_token=END)
    ((example,),) = encoder.encode([talk([ASKED, CALLED])])
    assert plain(example) == expected(
        encoder.tokenizer,
        f"{USER}q{END}{ASSISTANT}",
        Supervised('{"city": "Rome", "days": 2}f' + END),
        "\n",
    )


def test_system_turn_that_is_merged_into_the_answer_is_an_error(tokenizer_json):
    encoder = encoder_of(tokenizer_json, MERGES_INTO_NEXT, eos_token=END)
    messages = [turn("system", "Guide."), turn("assistant", "Welcome."), ASKED, turn("assistant", "a")]
    assert "does not render the text of this system turn" in str(error_of(encoder, talk(messages)))
    assert encode(encoder, ("system", "S"), ("user", "q"), ("assistant", "a")) == [
        expected(encoder.tokenizer, f"{USER}S\n\nq{END}{ASSISTANT}", Supervised(f"a{END}"))
    ]


@pytest.mark.parametrize("place", [0, 1])
def test_text_that_the_template_changes_is_an_error(tokenizer_json, place):
    encoder = encoder_of(tokenizer_json, SWITCHES, eos_token=END)
    messages = [turn("user", "What is this?"), turn("assistant", "A question.")]
    assert len(encoder.encode([talk(messages)])[0]) == 1
    messages[place]["content"] = "What is </think>?"
    error = error_of(encoder, talk(messages))
    assert str(error).startswith(f"messages[{place}]: the chat template ")


def test_prompt_may_have_more_text_before_the_same_header(tokenizer_json):
    encoder = encoder_of(tokenizer_json, SWITCH_IN_PROMPT, eos_token=END)
    assert encode(encoder, ("user", "q"), ("assistant", "a")) == [
        expected(encoder.tokenizer, " USER: q /think_off ASSISTANT:", Supervised(f" a{END}"))
    ]


# The prompt opens and closes a think block, of which the rendering of an answer has only the end (DeepSeek).
CLOSES_ONLY = """{% for m in messages %}
{{- '<|' + m.role + '|>' + ('</think>' if m.role == 'assistant' else '') }}
{{- m.content + ('<|end|>' if m.role == 'assistant' else '') }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think></think>' }}{% endif %}"""

# White space around the header differs between the prompt and the rendering of an answer.
SPACED = """{% for m in messages %}
{{- '<|' + m.role + '|>  ' if m.role == 'user' else '  <|assistant|>    </think>  ' }}
{{- m.content + ('<|end|>' if m.role == 'assistant' else '') }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>  </think>' }}{% endif %}"""

# A call gets an identifier once it is followed by its result.
IDENTIFIED = """{% for m in messages %}{% if m.tool_calls %}
{{- '<|assistant|>[' + m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson }}
{{- '' if loop.last else ', 1' }}{{ ']\\n<|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def test_call_that_is_rendered_differently_once_it_has_a_result(tokenizer_json):
    encoder = encoder_of(tokenizer_json, IDENTIFIED, eos_token=END)
    first, second = encoder.encode([talk([ASKED, CALLED, turn("tool", "3"), turn("assistant", "a")])])[0]
    body = 'f{"city": "Rome", "days": 2}'
    assert plain(first) == expected(
        encoder.tokenizer, f"{USER}q{END}{ASSISTANT}", Supervised(f"[{body}]\n{END}")
    )
    assert plain(second) == expected(
        encoder.tokenizer, f"{USER}q{END}{ASSISTANT}[{body}, 1]\n{END}<|tool|>3{END}{ASSISTANT}",
        Supervised(f"a{END}"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        (CLOSES_ONLY, "<|user|>q<|assistant|><think></think>", "a<|end|>"),
        (SPACED, "<|user|>  q<|assistant|>  </think>", "  a<|end|>"),
    ],
)
def test_completion_begins_behind_the_last_tag_that_prompt_and_rendering_share(
    tokenizer_json, template, prompt, completion
):
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    assert encode(encoder, ("user", "q"), ("assistant", "a")) == [
        expected(encoder.tokenizer, prompt, Supervised(completion))
    ]


@pytest.mark.parametrize("template", [CLOSES_ONLY, SPACED])
def test_inline_reasoning_after_a_prompt_that_closes_thinking_is_an_error(tokenizer_json, template):
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    error = error_of(encoder, talk([ASKED, turn("assistant", "<think>hm</think>a")]))
    assert "closes the thinking block in the prompt already" in str(error)


def test_empty_reasoning_is_passed_to_the_template_under_all_its_keys(tokenizer_json):
    template = """{% for m in messages %}{{ '<|' + m.role + '|>' }}
{%- if m.thinking is defined %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}{{ m.content + '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    ((example,),) = encoder.encode([talk([ASKED, turn("assistant", "a", reasoning_content="")])])
    assert plain(example) == expected(
        encoder.tokenizer, f"{USER}q{END}{ASSISTANT}", Supervised(f"<think></think>a{END}")
    )


def test_argument_that_the_template_leaves_out_is_an_error(tokenizer_json):
    template = REPEATS_NAME.replace(
        "m.tool_calls[0].function.arguments | tojson",
        "m.tool_calls[0].function.arguments.items() | rejectattr(1, 'none') | list | tojson",
    )
    encoder = encoder_of(tokenizer_json, template, "<|call|>", eos_token=END)
    assert len(encoder.encode([talk([ASKED, CALLED])])[0]) == 1
    called = turn("assistant", tool_calls=[call("f", {"city": "Rome", "wet": None})])
    assert "does not render its tool calls" in str(error_of(encoder, talk([ASKED, called])))


@pytest.mark.parametrize("eos", [END, "<|endoftext|>"])
def test_ends_are_found_in_a_template_that_requires_a_system_turn(tokenizer_json, eos):
    template = """{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    encoder = encoder_of(tokenizer_json, template, eos_token=eos)
    ((example,),) = encoder.encode([talk([turn("system", "S"), ASKED, turn("assistant", "a")])])
    assert plain(example) == expected(
        encoder.tokenizer, f"<|system|>S{END}{USER}q{END}{ASSISTANT}", Supervised(f"a{END}")
    )
    assert example.endings == (END,)
    error = error_of(encoder, talk([ASKED, turn("assistant", "a")]))
    assert str(error) == "the chat template refuses the conversation: no system turn"


def test_first_turn_without_a_header_is_an_error(tokenizer_json):
    template = """{% for m in messages %}{% if loop.first and m.role != 'user' %}{{ m.content + '<|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    error = error_of(encoder, talk([turn("assistant", "Welcome."), ASKED, turn("assistant", "a")]))
    assert str(error).startswith("messages[0]: the chat template renders the turn behind another header")


def test_turn_before_a_late_system_turn_ends_like_other_turns(tokenizer_json):
    encoder = encoder_of(tokenizer_json, NEXT_HEADER, USER, eos_token="<|endoftext|>")
    messages = ("user", "q"), ("assistant", "a"), ("system", "s"), ("user", "r"), ("assistant", "b")
    assert encode(encoder, *messages) == [
        expected(encoder.tokenizer, f"{USER}q{ASSISTANT}", Supervised(f"a{USER}")),
        expected(
            encoder.tokenizer, f"{USER}q{ASSISTANT}a<|system|>s{USER}r{ASSISTANT}", Supervised(f"b{USER}")
        ),
    ]
