"""A conversation is one sequence if each prompt begins with the previous one; else the reason is noted."""

from dft.data.templates.renderer import CHANGES_SPACE
from tests.data.templates.chat_templates import (
    CHATML_LINES,
    FORGETS_REASONING,
    OPENS_THINKING,
    encoder_of,
    talk,
    turn,
)

END = "<|im_end|>"


def test_the_second_sequence_says_what_the_template_renders_differently(tokenizer_json):
    encoder = encoder_of(tokenizer_json, FORGETS_REASONING, eos_token=END)
    messages = [
        turn("user", "q"), turn("assistant", "<think>\nhm\n</think>\n\nOne"), turn("user", "r"),
        turn("assistant", "Two"),
    ]  # fmt: skip
    (group,) = encoder.sequences([talk(messages)])
    assert [rendering.reason for rendering, _ in group] == [
        "",
        "the chat template renders "
        "'<|im_start|>assistant\\n<think>\\nhm\\n</think>\\n\\nOne<|im_end|>\\n' as "
        "'<|im_start|>assistant\\nOne<|im_end|>\\n<|im_start|>user\\nr<|im_end' "
        "once the conversation continues",
    ]


def test_one_sequence_has_no_reason(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHATML_LINES, eos_token=END)
    messages = [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]
    ((sequence,),) = encoder.sequences([talk(messages)])
    assert sequence[0].reason == "" and not sequence[0].in_pieces


def test_answer_inside_an_opened_block_is_noted(tokenizer_json):
    encoder = encoder_of(tokenizer_json, OPENS_THINKING, "<|end|>", eos_token="<|endoftext|>")
    ((sequence,),) = encoder.sequences([talk([turn("user", "q"), turn("assistant", "a")])])
    assert sequence[0].remarks == {
        "the prompt of a turn without reasoning ends with '<think>', as at inference, so the model learns to "
        "answer inside of that block": "messages[1]"
    }


def test_changed_white_space_inside_of_an_answer_is_noted(tokenizer_json):
    template = CHATML_LINES.replace("m.content +", "m.content | replace('\\n\\n', '\\n') +")
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    ((sequence,),) = encoder.sequences([talk([turn("user", "q"), turn("assistant", "a\n\nb")])])
    rendering, _ = sequence
    assert rendering.text[slice(*rendering.spans[0])] == f"a\nb{END}"
    assert rendering.remarks == {CHANGES_SPACE: "messages[1]"}
    ((sequence,),) = encoder.sequences([talk([turn("user", "q"), turn("assistant", " a\nb ")])])
    assert sequence[0].remarks == {}


def test_answer_that_would_share_a_token_with_its_prompt_is_noted(tokenizer_json):
    template = CHATML_LINES.replace("assistant\\n", "assistant: ").replace("m.role + '\\n'", "m.role + ': '")
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    ((sequence,),) = encoder.sequences([talk([turn("user", "q"), turn("assistant", "a")])])
    assert sequence[0].in_pieces
    assert list(sequence[0].remarks.values()) == [repr("m_start|>assistant: a<|im_end|>\n")]
