"""Supervised tokens under chat templates like those of model families, compared id by id."""

import pytest
from tokenizers import AddedToken, Tokenizer

from dft.data.conversations.faults import BadLine
from tests.data.templates.chat_templates import (
    BRACKETS,
    CHANNELS,
    CHATML_LINES,
    DEFAULT_SYSTEM,
    EOS_BEHIND_ALL,
    FORGETS_REASONING,
    MERGES_SYSTEM,
    NEXT_HEADER_ENDS,
    NO_END,
    OPENS_THINKING,
    REWRITES_QUESTION,
    TAGGED,
    TAGGED_IN_A_COMMENT,
    TAGGED_WIDE,
    Supervised,
    call,
    encode,
    encoder_for,
    encoder_of,
    error_of,
    examples_of,
    expected,
    plain,
    talk,
    turn,
)

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@pytest.mark.parametrize("template", [TAGGED, TAGGED_WIDE, TAGGED_IN_A_COMMENT, CHATML_LINES])
def test_generation_tags_define_the_spans_without_header_and_newline(tokenizer_json, template):
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    answer = "a <|im_end|> b"
    conversation = ("user", ASSISTANT), ("assistant", answer), ("user", "q"), ("assistant", "i")
    assert encode(encoder, *conversation) == [
        expected(
            encoder.tokenizer, USER + ASSISTANT + END + "\n" + ASSISTANT, Supervised(answer + END),
            "\n" + USER + "q" + END + "\n" + ASSISTANT, Supervised("i" + END), "\n",
        )
    ]  # fmt: skip


def test_rewritten_history_gives_one_sequence_per_turn_as_at_inference(tokenizer_json):
    encoder = encoder_of(tokenizer_json, FORGETS_REASONING, eos_token=END)
    first, second = "<think>\nhm\n</think>\n\nOne", "<think>\nok\n</think>\n\nTwo"
    conversation = (("user", "q"), ("assistant", first), ("user", "r"), ("assistant", second))
    assert encode(encoder, *conversation) == [
        expected(encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised(first + END), "\n"),
        expected(
            encoder.tokenizer,
            USER + "q" + END + "\n" + ASSISTANT + "One" + END + "\n" + USER + "r" + END + "\n" + ASSISTANT,
            Supervised(second + END), "\n",
        ),
    ]  # fmt: skip


def test_turns_that_are_not_rewritten_share_one_sequence(tokenizer_json):
    encoder = encoder_of(tokenizer_json, FORGETS_REASONING, eos_token=END)
    thought = "<think>\nstop <|im_end|> here\n</think>\n\nTwo"
    assert encode(encoder, ("user", "q"), ("assistant", "One"), ("user", "r"), ("assistant", thought)) == [
        expected(
            encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised("One" + END),
            "\n" + USER + "r" + END + "\n" + ASSISTANT, Supervised(thought + END), "\n",
        )
    ]  # fmt: skip


def test_first_token_is_never_supervised(tokenizer_json):
    template = "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"
    encoder = encoder_of(tokenizer_json, template, eos_token="<|end|>")
    ids, labels = expected(encoder.tokenizer, Supervised("abc<|end|>"), "q<|end|>", Supervised("i<|end|>"))
    assert labels[0] == -100 and labels[1] == ids[1]
    assert encode(encoder, ("assistant", "abc"), ("user", "q"), ("assistant", "i")) == [(ids, labels)]


@pytest.mark.parametrize("answer", ["<b>bold", "<think", "t", "plain"])
def test_answer_may_begin_like_the_think_tag_of_the_prompt(tokenizer_json, answer):
    encoder = encoder_of(tokenizer_json, OPENS_THINKING, "<|end|>", eos_token="<|endoftext|>")
    opened = "<|assistant|><think>\n"
    assert encode(encoder, ("user", "q"), ("assistant", answer), ("user", "r"), ("assistant", "t")) == [
        expected(encoder.tokenizer, "<|user|>q" + opened, Supervised(answer + "<|end|>")),
        expected(
            encoder.tokenizer, f"<|user|>q<|assistant|>{answer}<|end|><|user|>r{opened}",
            Supervised("t<|end|>"),
        ),
    ]  # fmt: skip


def test_eos_after_the_conversation_is_not_supervised_and_does_not_split_it(tokenizer_json):
    encoder = encoder_of(tokenizer_json, EOS_BEHIND_ALL, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "end")) == [
        expected(
            encoder.tokenizer, "<|user|>\nq<|end|>\n<|assistant|>\n", Supervised("a<|end|>"),
            "\n<|user|>\nr<|end|>\n<|assistant|>\n", Supervised("end<|end|>"), "\n<|endoftext|>",
        )
    ]  # fmt: skip


def test_end_token_that_absorbs_white_space_is_still_supervised(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    encoder = encoder_of(backend.to_str(), EOS_BEHIND_ALL, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", "a")) == [
        expected(
            encoder.tokenizer, "<|user|>\nq<|end|>\n<|assistant|>\n", Supervised("a<|end|>"), "<|endoftext|>"
        )
    ]  # fmt: skip


def test_without_end_tokens_the_next_header_stops_the_model(tokenizer_json):
    stops = ("<|user|>", "<|observation|>")
    encoder = encoder_of(tokenizer_json, NEXT_HEADER_ENDS, *stops, eos_token="<|endoftext|>")
    conversation = (("user", "q"), ("assistant", "call"), ("tool", "3"), ("assistant", "say <|user|> i"))
    (example,) = examples_of(encoder, *conversation)
    assert plain(example) == expected(
        encoder.tokenizer, "[gMASK]<sop><|user|>\nq<|assistant|>\n", Supervised("call<|observation|>"),
        "\n3<|assistant|>\n", Supervised("say <|user|> i<|user|>"),
    )  # fmt: skip
    assert example.endings == ("<|observation|>", "<|user|>")


def test_final_tool_call_is_stopped_by_the_header_of_its_result(tokenizer_json):
    stops = ("<|user|>", "<|observation|>")
    encoder = encoder_of(tokenizer_json, NEXT_HEADER_ENDS, *stops, eos_token="<|endoftext|>")
    answer = turn("assistant", tool_calls=[call("f", {})])
    ((example,),) = encoder.encode([talk([turn("user", "q"), answer])])
    assert plain(example) == expected(
        encoder.tokenizer, "[gMASK]<sop><|user|>\nq<|assistant|>\n", Supervised("f()<|observation|>")
    )


def test_last_turn_may_end_with_a_different_token(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHANNELS, "<|return|>", "<|call|>", eos_token="<|return|>")
    prompt, final = "<|start|>user<|message|>q<|end|><|start|>assistant", "<|channel|>final<|message|>"
    conversation = ("user", "q"), ("assistant", "a <|return|> b"), ("user", "r"), ("assistant", "c")
    assert encode(encoder, *conversation) == [
        expected(encoder.tokenizer, prompt, Supervised(final + "a <|return|> b<|return|>")),
        expected(
            encoder.tokenizer, prompt + final + "a <|return|> b<|end|><|start|>user<|message|>r<|end|>"
            "<|start|>assistant", Supervised(final + "c<|return|>"),
        ),
    ]  # fmt: skip


def test_tool_call_with_its_own_end_token_stays_in_the_sequence(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHANNELS, "<|return|>", "<|call|>", eos_token="<|return|>")
    call = {"function": {"name": "f", "arguments": {"x": "<|call|>"}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "a"},
    ]
    ((example,),) = encoder.encode([talk(messages)])
    assert plain(example) == expected(
        encoder.tokenizer,
        "<|start|>user<|message|>q<|end|><|start|>assistant",
        Supervised(' to=f<|channel|>commentary<|message|>{"x": "<|call|>"}<|call|>'),
        "<|start|>tool<|message|>3<|end|><|start|>assistant",
        Supervised("<|channel|>final<|message|>a<|return|>"),
    )


def test_system_prompt_merged_into_the_question_with_bos_and_trimmed_answers(tokenizer_json):
    encoder = encoder_of(tokenizer_json, MERGES_SYSTEM, eos_token="<end_of_turn>", bos_token="<bos>")
    assert encode(encoder, ("system", "S"), ("user", "q"), ("assistant", "  i \n")) == [
        expected(
            encoder.tokenizer, "<bos><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\n",
            Supervised("i<end_of_turn>"), "\n",
        )
    ]  # fmt: skip


def test_template_that_raises_on_the_order_of_roles_reports_its_reason(tokenizer_json):
    encoder = encoder_of(tokenizer_json, MERGES_SYSTEM, eos_token="<end_of_turn>", bos_token="<bos>")
    roles = ("user", "user", "assistant")
    error = error_of(encoder, talk([turn(role, "c") for role in roles]))
    assert str(error) == "the chat template refuses the conversation: roles must alternate user/assistant"


def test_without_a_generation_prompt_the_answer_begins_after_the_question(tokenizer_json):
    encoder = encoder_of(tokenizer_json, BRACKETS, eos_token="</s>", bos_token="<s>")
    assert encode(encoder, ("user", "q"), ("assistant", "a </s> b"), ("user", "r"), ("assistant", "s")) == [
        expected(
            encoder.tokenizer, "<s>[INST] q [/INST]", Supervised(" a </s> b</s>"), "[INST] r [/INST]",
            Supervised(" s</s>"),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("condition", ["{% if ", "{% if messages and "])
def test_default_system_turn_is_not_supervised_if_the_assistant_begins(tokenizer_json, condition):
    template = DEFAULT_SYSTEM.replace("{% if ", condition, 1)
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    system = "<|im_start|>system\nBe good.<|im_end|>\n"
    assert encode(encoder, ("assistant", "Be good."), ("user", "q"), ("assistant", "i")) == [
        expected(
            encoder.tokenizer, system + ASSISTANT, Supervised("Be good." + END),
            "\n" + USER + "q" + END + "\n" + ASSISTANT, Supervised("i" + END), "\n",
        )
    ]  # fmt: skip


def test_question_that_is_rewritten_once_answered_is_context_as_at_inference(tokenizer_json):
    encoder = encoder_of(tokenizer_json, REWRITES_QUESTION, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "question"), ("assistant", "answer")) == [
        expected(encoder.tokenizer, "<|user|>now: question<|assistant|>", Supervised("answer<|end|>"))
    ]


def test_turns_without_a_stop_token_have_no_ending(tokenizer_json):
    encoder = encoder_of(tokenizer_json, NO_END, eos_token="<|endoftext|>")
    (example,) = examples_of(encoder, ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert plain(example) == expected(
        encoder.tokenizer, "user:\nq\nassistant:\n", Supervised("a"),
        "\nuser:\nr\nassistant:\n", Supervised("b"), "\n",
    )  # fmt: skip
    assert example.endings == (None, None)


def test_end_token_that_is_no_stop_token_still_ends_the_turn(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHATML_LINES, eos_token="<|endoftext|>")
    (example,) = examples_of(encoder, ("user", "q"), ("assistant", "say <|im_end|> i"))
    assert plain(example) == expected(
        encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised("say <|im_end|> i" + END), "\n"
    )
    assert example.endings == (END,)


def test_turn_end_that_cannot_be_found_is_an_error(tokenizer_json):
    template = CHATML_LINES.replace("m.content +", "m.content + m.content[:1] +")
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    assert len(examples_of(encoder, ("user", "q"), ("assistant", "fine"))) == 1
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>"}]
    error = error_of(encoder, talk(messages))
    assert isinstance(error, BadLine) and str(error).startswith("messages[1] contains special tokens")


EXACT = {
    "separator": [
        "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>", Supervised("a b<|im_end|>"),
        "<|im_start|>user<|im_sep|>r<|im_end|><|im_start|>assistant<|im_sep|>", Supervised("c<|im_end|>"),
    ],
    "turn_tokens": [
        "<bos><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", Supervised("a b<|END_OF_TURN_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>r<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", Supervised("c<|END_OF_TURN_TOKEN|>"),
    ],
    "eos_behind_answers": [
        "<bos><|user|>\nq\n<|assistant|>\n", Supervised("a b<|endoftext|>"),
        "\n<|user|>\nr\n<|assistant|>\n", Supervised("c<|endoftext|>"),
    ],
    "blank_line": [
        "### Instruction:\n\nq\n\n### Response:\n\n", Supervised("a b</s>"),
        "### Instruction:\n\nr\n\n### Response:\n\n", Supervised("c</s>"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", EXACT)
def test_headers_and_ends_of_a_family_are_not_part_of_the_answer(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family)
    conversation = ("user", "q"), ("assistant", "a b"), ("user", "r"), ("assistant", "c")
    assert encode(encoder, *conversation) == [expected(encoder.tokenizer, *EXACT[family])]


def test_space_at_the_end_of_the_prompt_is_a_separate_token_as_at_inference(tokenizer_json):
    """In the second prompt that space is part of the answer's first token, so the conversation unrolls."""
    encoder = encoder_for(tokenizer_json, "colon_space")
    conversation = ("user", "q"), ("assistant", "a b"), ("user", "r"), ("assistant", "c")
    assert encode(encoder, *conversation) == [
        expected(encoder.tokenizer, "USER: q ASSISTANT: ", Supervised("a b</s>")),
        expected(encoder.tokenizer, "USER: q ASSISTANT: a b</s>USER: r ASSISTANT: ", Supervised("c</s>")),
    ]
