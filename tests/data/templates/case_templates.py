"""Small chat templates with the behaviors that make masks go wrong, each with what is right under it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.data.templates.chat_templates import Supervised, call, turn

END = "<|im_end|>"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
EXTRA_TOKENS = ("<think>", "</think>", "<|quad|>", "<quad|>", "<|eom|>")
"""Added tokens besides those of the test tokenizer."""

LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
CONTENT = "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

CHATML = LOOP + CONTENT + PROMPT

# The prompt opens thinking, and an answer without any begins by closing it.
CLOSES_WITHOUT_OPENING = (
    LOOP
    + """{% if m.role == 'assistant' %}
{{- '<think>' + m.reasoning_content if m.reasoning_content else '' }}{{ '</think>' }}{% endif %}"""
    + CONTENT
    + PROMPT[: -len("{% endif %}")]
    + "{{ '</think>' if enable_thinking is false else '<think>' }}{% endif %}"
)

# {% generation %} around the header, which depends on a variable.
TAGGED_HEADER = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n' + ('</think>' if enable_thinking is false else '<think></think>') }}
{{- m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('</think>' if enable_thinking is false else '<think>') }}{% endif %}"""

# The system prompt is written into the last message, if that is a question.
SYSTEM_IN_LAST_QUESTION = (
    """{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last and m.role == 'user' and messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"""
    + PROMPT
)

# A system turn of the template, in the prompt alone.
SYSTEM_IN_PROMPT = (
    "{% if add_generation_prompt %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML
)

# An instruction of the template behind all messages, and calls without an end token.
TRAILING_INSTRUCTION = (
    LOOP
    + """{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson + '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{{- '<|im_start|>system\\nList your actions.<|im_end|>\\n' }}"""
    + PROMPT
)

# The generation prompt is written within the loop, so an empty conversation has none.
PROMPT_IN_LOOP = (
    LOOP
    + """{{ m.content + '<|im_end|>\\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}{% endfor %}"""
)

# A default system turn as soon as there is a message, so an empty conversation has another prompt.
DEFAULT_SYSTEM_TURN = (
    """{% if messages and messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are an answer.<|im_end|>\\n' }}{% endif %}"""
    + LOOP
    + CONTENT
    + PROMPT
)

# Calls are written behind the end of the turn.
CALL_BEHIND_END = (
    LOOP
    + """{{ m.content + '<|im_end|>\\n' }}
{%- if m.tool_calls %}
{{- '<|im_start|>call\\n' + m.tool_calls[0].function | tojson + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}"""
    + PROMPT
)

# Calls have a token of their own at the end.
CALL_WITH_OWN_END = (
    LOOP
    + """{% if m.tool_calls %}{{ '<|quad|>' + m.tool_calls[0].function | tojson + '<quad|>' }}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"""
    + PROMPT
)

# Text and call in one turn, with its end token behind both.
TEXT_AND_CALL = (
    LOOP
    + """{{ m.content }}{% for c in m.tool_calls or [] %}
{{- '<|quad|>' + c.function | tojson + '<quad|>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"""
    + PROMPT
)

# The prompt closes thinking unless it is switched on.
CLOSED_BY_DEFAULT = (
    LOOP
    + """{% if m.role == 'assistant' %}
{{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '</think>' }}{% endif %}"""
    + CONTENT
    + """{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{{- '<think>' if enable_thinking else '</think>' }}{% endif %}"""
)

# Thinking stays in the last answer, even behind a question.
LAST_ANSWER_THINKS = (
    """{% set last = namespace(answer=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}
{%- set last.answer = loop.index0 %}{% endif %}{% endfor %}"""
    + LOOP
    + """{{ m.content if loop.index0 == last.answer else m.content.split('</think>')[-1] }}
{{- '<|im_end|>\\n' }}{% endfor %}"""
    + PROMPT
)

# The prompt opens thinking, which no rendering of a turn has.
OPENS_IN_PROMPT = LOOP + CONTENT + PROMPT[: -len("{% endif %}")] + "{{ '<think>\\n' }}{% endif %}"

# The prompt opens and closes an empty channel, which no rendering of a turn has; channels written into the
# content are removed.
EMPTY_CHANNEL_IN_PROMPT = (
    LOOP
    + """{{ (m.content.split('<quad|>')[-1] if m.role == 'assistant' else m.content) + '<|im_end|>\\n' }}
{%- endfor %}"""
    + PROMPT[: -len("{% endif %}")]
    + "{{ '<|quad|>thought\\n<quad|>' }}{% endif %}"
)

# Only the roles user, assistant and a first system turn are written.
DROPS_ROLES = (
    """{% for m in messages %}{% if m.role in ['user', 'assistant'] or loop.first and m.role == 'system' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"""
    + PROMPT
)

# A late system turn is an error of the template.
NO_LATE_SYSTEM = (
    LOOP
    + """{% if m.role == 'system' and not loop.first %}
{{- raise_exception('system must come first') }}{% endif %}"""
    + CONTENT
    + PROMPT
)

# Channels; the analysis of a call is removed once a final answer follows.
CHANNELS = """{% set final = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}
{%- for m in messages %}{{ '<|start|>' + m.role }}
{%- if m.role != 'assistant' %}{{ '<|message|>' + m.content + '<|end|>' }}
{%- else %}{% if m.reasoning_content and not (m.tool_calls and final) %}
{{- '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}{% endif %}
{%- if m.tool_calls %}{{ '<|channel|>call<|message|>' + m.tool_calls[0].function | tojson + '<|call|>' }}
{%- else %}{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# The content of every role is a list of parts.
ALL_IN_PARTS = (
    LOOP + "{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)

# An end token that is not the eos token.
OTHER_END = CHATML.replace(END, "<|eom|>")

# An empty think block in the last answer only.
EMPTY_BLOCK_WHEN_LAST = (
    LOOP
    + """{% if loop.last and m.role == 'assistant' %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
    + CONTENT
    + PROMPT
)

Row = dict[str, Any]


def rows(*turns: dict[str, Any], **more: Any) -> Row:
    return {"messages": list(turns), **more}


class Case(NamedTuple):
    """A row under a template.

    Attributes:
        template: the template.
        row: the row.
        expected: its training sequences as pieces of text, up to the last supervised token, or the kind of
            the refusal.
        stops: tokens that stop generation, besides the eos token.
    """

    template: str
    row: Row
    expected: list[tuple[str, ...]] | str
    stops: tuple[str, ...] = ()


def question(text: str) -> str:
    return f"{USER}{text}{END}\n"


S = Supervised
Q, A, Q2, A2 = (
    turn("user", "a planet"),
    turn("assistant", "Mars."),
    turn("user", "two?"),
    turn("assistant", "Four."),
)
ASKED, AGAIN = question("a planet"), question("two?")
CALL = turn("assistant", "", tool_calls=[call("add", {"a": "one"})])
CALL_TEXT = '{"name": "add", "arguments": {"a": "one"}}'
RESULT = turn("tool", "2")
REASONED = turn("assistant", "Mars.", reasoning_content="It is red.")
OFF: Callable[..., Row] = lambda *turns: rows(*turns, chat_template_kwargs={"enable_thinking": False})  # noqa: E731

CASES: dict[str, Case] = {
    "answer closes the thinking that the prompt opens": Case(
        CLOSES_WITHOUT_OPENING,
        rows(Q, A, Q2, A2),
        [
            (ASKED + ASSISTANT + "<think>", S("</think>Mars." + END)),
            (
                ASKED + ASSISTANT + "</think>Mars." + END + "\n" + AGAIN + ASSISTANT + "<think>",
                S("</think>Four." + END),
            ),
        ],
    ),
    "reasoning continues behind the prompt that opens it": Case(
        CLOSES_WITHOUT_OPENING,
        rows(Q, REASONED),
        [(ASKED + ASSISTANT + "<think>", S("It is red.</think>Mars." + END))],
    ),
    "answer begins behind the thinking that the prompt closes": Case(
        CLOSES_WITHOUT_OPENING, OFF(Q, A), [(ASKED + ASSISTANT + "</think>", S("Mars." + END))]
    ),
    "tags around a header of other variables": Case(
        TAGGED_HEADER, OFF(Q, A), [(ASKED + ASSISTANT + "</think>", S("Mars." + END))]
    ),
    "tags around a header that closes what the prompt opens": Case(
        TAGGED_HEADER, rows(Q, A), [(ASKED + ASSISTANT + "<think>", S("</think>Mars." + END))]
    ),
    "system prompt in the last question": Case(
        SYSTEM_IN_LAST_QUESTION,
        rows(turn("system", "Be brief."), Q, A, Q2, A2),
        [
            (question("Be brief.\n\na planet") + ASSISTANT, S("Mars." + END)),
            (
                ASKED + ASSISTANT + "Mars." + END + "\n" + question("Be brief.\n\ntwo?") + ASSISTANT,
                S("Four." + END),
            ),
        ],
    ),
    "system turn of the template in the prompt alone": Case(
        SYSTEM_IN_PROMPT,
        rows(Q, A),
        [("<|im_start|>system\nBe kind.<|im_end|>\n" + ASKED + ASSISTANT, S("Mars." + END))],
    ),
    "instruction behind the messages": Case(
        TRAILING_INSTRUCTION,
        rows(Q, A),
        [(ASKED + "<|im_start|>system\nList your actions.<|im_end|>\n" + ASSISTANT, S("Mars." + END))],
    ),
    "assistant first, with an instruction behind the messages": Case(
        TRAILING_INSTRUCTION,
        rows(A),
        [(ASSISTANT, S("Mars." + END))],
    ),
    "instruction behind a call without an end": Case(
        TRAILING_INSTRUCTION, rows(Q, CALL), "a turn without an end-of-turn token"
    ),
    "assistant first, and the prompt is written in the loop": Case(
        PROMPT_IN_LOOP,
        rows(A, Q2, A2),
        [(ASSISTANT, S("Mars." + END), "\n" + AGAIN + ASSISTANT, S("Four." + END))],
    ),
    "assistant first, behind a default system turn": Case(
        DEFAULT_SYSTEM_TURN,
        rows(A, Q2, A2),
        [
            (
                "<|im_start|>system\nYou are an answer.<|im_end|>\n" + ASSISTANT,
                S("Mars." + END),
                "\n" + AGAIN + ASSISTANT,
                S("Four." + END),
            )
        ],
    ),
    "call behind the end of the turn": Case(
        CALL_BEHIND_END, rows(Q, CALL, RESULT, A2), "text after the end-of-turn token"
    ),
    "call that ends with a stop token of its own": Case(
        CALL_WITH_OWN_END,
        rows(Q, CALL),
        [(ASKED + ASSISTANT, S("<|quad|>" + CALL_TEXT + "<quad|>"))],
        ("<quad|>",),
    ),
    "call that ends with a token at which nothing stops": Case(
        CALL_WITH_OWN_END, rows(Q, CALL), "a turn without an end-of-turn token"
    ),
    "text with a call": Case(
        TEXT_AND_CALL,
        rows(Q, turn("assistant", "I add.", tool_calls=CALL["tool_calls"]), RESULT, A2),
        [
            (
                ASKED + ASSISTANT,
                S("I add.<|quad|>" + CALL_TEXT + "<quad|>" + END),
                "\n<|im_start|>tool\n2<|im_end|>\n" + ASSISTANT,
                S("Four." + END),
            )
        ],
    ),
    "reasoning behind a prompt that closes thinking": Case(
        CLOSED_BY_DEFAULT, rows(Q, REASONED), "reasoning after a prompt that closes it"
    ),
    "no reasoning behind a prompt that closes thinking": Case(
        CLOSED_BY_DEFAULT, rows(Q, A), [(ASKED + ASSISTANT + "</think>", S("Mars." + END))]
    ),
    "reasoning behind a prompt that opens thinking on demand": Case(
        CLOSED_BY_DEFAULT,
        rows(Q, REASONED, chat_template_kwargs={"enable_thinking": True}),
        [(ASKED + ASSISTANT + "<think>", S("It is red.</think>Mars." + END))],
    ),
    "history keeps the thinking of the last answer": Case(
        LAST_ANSWER_THINKS,
        rows(
            Q,
            turn("assistant", "<think>Red.</think>Mars."),
            Q2,
            turn("assistant", "<think>Add.</think>Four."),
        ),
        [
            (
                ASKED + ASSISTANT,
                S("<think>Red.</think>Mars." + END),
                "\n" + AGAIN + ASSISTANT,
                S("<think>Add.</think>Four." + END),
            )
        ],
    ),
    "thinking that is opened in the prompt only": Case(
        OPENS_IN_PROMPT,
        rows(Q, A, Q2, A2),
        [
            (ASKED + ASSISTANT + "<think>\n", S("Mars." + END)),
            (ASKED + ASSISTANT + "Mars." + END + "\n" + AGAIN + ASSISTANT + "<think>\n", S("Four." + END)),
        ],
    ),
    "empty channel in the prompt only": Case(
        EMPTY_CHANNEL_IN_PROMPT,
        rows(Q, A, Q2, A2),
        [
            (ASKED + ASSISTANT + "<|quad|>thought\n<quad|>", S("Mars." + END)),
            (
                ASKED + ASSISTANT + "Mars." + END + "\n" + AGAIN + ASSISTANT + "<|quad|>thought\n<quad|>",
                S("Four." + END),
            ),
        ],
    ),
    "thinking written inline in a channel that is removed": Case(
        EMPTY_CHANNEL_IN_PROMPT,
        rows(Q, turn("assistant", "<|quad|>thought\nIt is red.<quad|>Mars.")),
        "part of the content is not rendered",
    ),
    "developer turn that is dropped": Case(
        DROPS_ROLES, rows(turn("developer", "Be brief."), Q, A), "developer turn is not rendered"
    ),
    "late system turn that is dropped": Case(
        DROPS_ROLES, rows(Q, A, turn("system", "Be brief."), Q2, A2), "system turn is not rendered"
    ),
    "late system turn that is an error": Case(
        NO_LATE_SYSTEM,
        rows(Q, A, turn("system", "Be brief."), Q2, A2),
        "the chat template refuses the conversation",
    ),
    "analysis of a call that the final answer removes": Case(
        CHANNELS,
        rows(Q, {**CALL, "reasoning_content": "Ask."}, RESULT, REASONED),
        [
            (
                "<|start|>user<|message|>a planet<|end|><|start|>assistant",
                S(
                    "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant<|channel|>call<|message|>"
                    + CALL_TEXT
                    + "<|call|>"
                ),
                "<|start|>tool<|message|>2<|end|><|start|>assistant",
                S(
                    "<|channel|>analysis<|message|>It is red.<|end|>"
                    "<|start|>assistant<|channel|>final<|message|>Mars.<|return|>"
                ),
            )
        ],
        ("<|return|>", "<|call|>"),
    ),
    "every role in parts, developer included": Case(
        ALL_IN_PARTS,
        rows(turn("developer", "Be brief."), Q, A),
        [("<|im_start|>developer\nBe brief.<|im_end|>\n" + ASKED + ASSISTANT, S("Mars." + END))],
    ),
    "end token that is not the eos token": Case(
        OTHER_END,
        rows(Q, A, Q2, A2),
        [
            (
                (ASKED + ASSISTANT).replace(END, "<|eom|>"),
                S("Mars.<|eom|>"),
                ("\n" + AGAIN + ASSISTANT).replace(END, "<|eom|>"),
                S("Four.<|eom|>"),
            )
        ],
    ),
    "two answers in a row, with an empty block in the last": Case(
        EMPTY_BLOCK_WHEN_LAST,
        rows(Q, A, A2),
        [
            (
                ASKED + ASSISTANT,
                S("<think>\n\n</think>\n\nMars." + END),
                "\n" + ASSISTANT,
                S("<think>\n\n</think>\n\nFour." + END),
            )
        ],
    ),
    "empty system turn": Case(
        DEFAULT_SYSTEM_TURN,
        rows(turn("system", ""), Q, A),
        [("<|im_start|>system\nYou are an answer.<|im_end|>\n" + ASKED + ASSISTANT, S("Mars." + END))],
    ),
    "answer that ends with the end token": Case(
        CHATML,
        rows(Q, turn("assistant", "Mars." + END)),
        [(ASKED + ASSISTANT, S("Mars." + END + END))],
    ),
}
