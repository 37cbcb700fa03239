"""The habits of chat templates: what is supervised under each, asserted id by id."""

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
    Taught,
    call,
    encode,
    encoder_for,
    encoder_of,
    examples_of,
    expected,
    plain,
    refusal_of,
    talk,
    turn,
)

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@pytest.mark.parametrize("template", [TAGGED, TAGGED_WIDE, TAGGED_IN_A_COMMENT, CHATML_LINES])
def test_generation_tags_say_what_is_supervised_less_header_and_newline(tokenizer_json, template):
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    answer = "a <|im_end|> b"
    conversation = ("user", ASSISTANT), ("assistant", answer), ("user", "q"), ("assistant", "i")
    assert encode(encoder, *conversation) == [
        expected(
            encoder.tokenizer, USER + ASSISTANT + END + "\n" + ASSISTANT, Taught(answer + END),
            "\n" + USER + "q" + END + "\n" + ASSISTANT, Taught("i" + END), "\n",
        )
    ]  # fmt: skip


def test_tags_count_only_in_code():
    from dft.data.templates.template import has_generation_tags

    assert has_generation_tags(TAGGED)
    assert has_generation_tags("{%-  generation -%}x{%- endgeneration -%}")
    assert not has_generation_tags(TAGGED_IN_A_COMMENT)
    assert not has_generation_tags("{{ '{% generation %}' }}")


def test_rewritten_history_unrolls_into_sequences_as_at_inference(tokenizer_json):
    encoder = encoder_of(tokenizer_json, FORGETS_REASONING, eos_token=END)
    first, second = "<think>\nhm\n</think>\n\nOne", "<think>\nok\n</think>\n\nTwo"
    conversation = (("user", "q"), ("assistant", first), ("user", "r"), ("assistant", second))
    assert encode(encoder, *conversation) == [
        expected(encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught(first + END), "\n"),
        expected(
            encoder.tokenizer,
            USER + "q" + END + "\n" + ASSISTANT + "One" + END + "\n" + USER + "r" + END + "\n" + ASSISTANT,
            Taught(second + END), "\n",
        ),
    ]  # fmt: skip


def test_turns_that_are_not_rewritten_share_one_sequence(tokenizer_json):
    encoder = encoder_of(tokenizer_json, FORGETS_REASONING, eos_token=END)
    thought = "<think>\nstop <|im_end|> here\n</think>\n\nTwo"
    assert encode(encoder, ("user", "q"), ("assistant", "One"), ("user", "r"), ("assistant", thought)) == [
        expected(
            encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught("One" + END),
            "\n" + USER + "r" + END + "\n" + ASSISTANT, Taught(thought + END), "\n",
        )
    ]  # fmt: skip


def test_the_first_token_is_never_supervised(tokenizer_json):
    template = "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"
    encoder = encoder_of(tokenizer_json, template, eos_token="<|end|>")
    ids, labels = expected(encoder.tokenizer, Taught("abc<|end|>"), "q<|end|>", Taught("i<|end|>"))
    assert labels[0] == -100 and labels[1] == ids[1]
    assert encode(encoder, ("assistant", "abc"), ("user", "q"), ("assistant", "i")) == [(ids, labels)]


@pytest.mark.parametrize("answer", ["<b>bold", "<think", "t", "plain"])
def test_an_answer_may_begin_like_the_think_tag_of_the_prompt(tokenizer_json, answer):
    encoder = encoder_of(tokenizer_json, OPENS_THINKING, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", answer), ("user", "r"), ("assistant", "t")) == [
        expected(
            encoder.tokenizer, "<|user|>q<|assistant|>", Taught(answer + "<|end|>"), "<|user|>r<|assistant|>",
            Taught("t<|end|>"),
        )
    ]  # fmt: skip


def test_eos_behind_the_whole_conversation_is_neither_supervised_nor_a_reason_to_unroll(tokenizer_json):
    encoder = encoder_of(tokenizer_json, EOS_BEHIND_ALL, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "end")) == [
        expected(
            encoder.tokenizer, "<|user|>\nq<|end|>\n<|assistant|>\n", Taught("a<|end|>"),
            "\n<|user|>\nr<|end|>\n<|assistant|>\n", Taught("end<|end|>"), "\n<|endoftext|>",
        )
    ]  # fmt: skip


def test_an_end_token_that_swallows_white_space_is_still_supervised(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    encoder = encoder_of(backend.to_str(), EOS_BEHIND_ALL, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", "a")) == [
        expected(
            encoder.tokenizer, "<|user|>\nq<|end|>\n<|assistant|>\n", Taught("a<|end|>"), "<|endoftext|>"
        )
    ]  # fmt: skip


def test_without_end_tokens_the_next_header_is_what_stops_the_model(tokenizer_json):
    stops = ("<|user|>", "<|observation|>")
    encoder = encoder_of(tokenizer_json, NEXT_HEADER_ENDS, *stops, eos_token="<|endoftext|>")
    conversation = (("user", "q"), ("assistant", "call"), ("tool", "3"), ("assistant", "say <|user|> i"))
    (example,) = examples_of(encoder, *conversation)
    assert plain(example) == expected(
        encoder.tokenizer, "[gMASK]<sop><|user|>\nq<|assistant|>\n", Taught("call<|observation|>"),
        "\n3<|assistant|>\n", Taught("say <|user|> i<|user|>"),
    )  # fmt: skip
    assert example.endings == ("<|observation|>", "<|user|>")


def test_a_tool_call_at_the_end_is_stopped_by_the_header_of_its_result(tokenizer_json):
    stops = ("<|user|>", "<|observation|>")
    encoder = encoder_of(tokenizer_json, NEXT_HEADER_ENDS, *stops, eos_token="<|endoftext|>")
    answer = turn("assistant", tool_calls=[call("f", {})])
    ((example,),) = encoder.encode([talk([turn("user", "q"), answer])])
    assert plain(example) == expected(
        encoder.tokenizer, "[gMASK]<sop><|user|>\nq<|assistant|>\n", Taught("f()<|observation|>")
    )


def test_the_last_turn_ends_with_another_token_than_turns_in_history(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHANNELS, "<|return|>", "<|call|>", eos_token="<|return|>")
    prompt, final = "<|start|>user<|message|>q<|end|><|start|>assistant", "<|channel|>final<|message|>"
    conversation = ("user", "q"), ("assistant", "a <|return|> b"), ("user", "r"), ("assistant", "c")
    assert encode(encoder, *conversation) == [
        expected(encoder.tokenizer, prompt, Taught(final + "a <|return|> b<|return|>")),
        expected(
            encoder.tokenizer, prompt + final + "a <|return|> b<|end|><|start|>user<|message|>r<|end|>"
            "<|start|>assistant", Taught(final + "c<|return|>"),
        ),
    ]  # fmt: skip


def test_a_tool_call_with_its_own_end_token_stays_in_the_sequence(tokenizer_json):
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
        Taught(' to=f<|channel|>commentary<|message|>{"x": "<|call|>"}<|call|>'),
        "<|start|>tool<|message|>3<|end|><|start|>assistant",
        Taught("<|channel|>final<|message|>a<|return|>"),
    )


def test_system_merged_into_the_question_with_bos_and_trimmed_answers(tokenizer_json):
    encoder = encoder_of(tokenizer_json, MERGES_SYSTEM, eos_token="<end_of_turn>", bos_token="<bos>")
    assert encode(encoder, ("system", "S"), ("user", "q"), ("assistant", "  i \n")) == [
        expected(
            encoder.tokenizer, "<bos><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\n",
            Taught("i<end_of_turn>"), "\n",
        )
    ]  # fmt: skip


def test_a_template_that_raises_on_the_order_of_roles_reports_its_reason(tokenizer_json):
    encoder = encoder_of(tokenizer_json, MERGES_SYSTEM, eos_token="<end_of_turn>", bos_token="<bos>")
    roles = ("user", "user", "assistant")
    refused = refusal_of(encoder, talk([turn(role, "c") for role in roles]))
    assert str(refused) == "the chat template refuses the conversation: roles must alternate user/assistant"


def test_without_a_generation_prompt_the_answer_begins_where_the_question_ends(tokenizer_json):
    encoder = encoder_of(tokenizer_json, BRACKETS, eos_token="</s>", bos_token="<s>")
    assert encode(encoder, ("user", "q"), ("assistant", "a </s> b"), ("user", "r"), ("assistant", "s")) == [
        expected(
            encoder.tokenizer, "<s>[INST] q [/INST]", Taught(" a </s> b</s>"), "[INST] r [/INST]",
            Taught(" s</s>"),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("condition", ["{% if ", "{% if messages and "])
def test_a_default_system_turn_is_not_supervised_when_the_assistant_opens(tokenizer_json, condition):
    template = DEFAULT_SYSTEM.replace("{% if ", condition, 1)
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    system = "<|im_start|>system\nBe good.<|im_end|>\n"
    assert encode(encoder, ("assistant", "Be good."), ("user", "q"), ("assistant", "i")) == [
        expected(
            encoder.tokenizer, system + ASSISTANT, Taught("Be good." + END),
            "\n" + USER + "q" + END + "\n" + ASSISTANT, Taught("i" + END), "\n",
        )
    ]  # fmt: skip


def test_a_question_that_is_rewritten_once_answered_is_never_supervised(tokenizer_json):
    encoder = encoder_of(tokenizer_json, REWRITES_QUESTION, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "question"), ("assistant", "answer")) == [
        expected(encoder.tokenizer, "<|user|>question<|assistant|>", Taught("answer<|end|>"))
    ]


def test_a_turn_without_any_stop_token_is_told(tokenizer_json):
    encoder = encoder_of(tokenizer_json, NO_END, eos_token="<|endoftext|>")
    (example,) = examples_of(encoder, ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert plain(example) == expected(
        encoder.tokenizer, "user:\nq\nassistant:\n", Taught("a"), "\nuser:\nr\nassistant:\n", Taught("b"),
        "\n",
    )  # fmt: skip
    assert example.endings == (None, None)


def test_an_end_token_unknown_to_the_model_still_ends_the_turn(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHATML_LINES, eos_token="<|endoftext|>")
    (example,) = examples_of(encoder, ("user", "q"), ("assistant", "say <|im_end|> i"))
    assert plain(example) == expected(
        encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught("say <|im_end|> i" + END), "\n"
    )
    assert example.endings == (END,)


def test_an_end_that_cannot_be_told_from_the_message_is_refused(tokenizer_json):
    template = CHATML_LINES.replace("m.content +", "m.content + m.content[:1] +")
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    assert len(examples_of(encoder, ("user", "q"), ("assistant", "fine"))) == 1
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>"}]
    refused = refusal_of(encoder, talk(messages))
    assert isinstance(refused, BadLine) and str(refused).startswith("messages[1] holds special tokens")


EXACT = {
    "separator": [
        "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>", Taught("a b<|im_end|>"),
        "<|im_start|>user<|im_sep|>r<|im_end|><|im_start|>assistant<|im_sep|>", Taught("c<|im_end|>"),
    ],
    "turn_tokens": [
        "<bos><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", Taught("a b<|END_OF_TURN_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>r<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", Taught("c<|END_OF_TURN_TOKEN|>"),
    ],
    "eos_behind_answers": [
        "<bos><|user|>\nq\n<|assistant|>\n", Taught("a b<|endoftext|>"),
        "\n<|user|>\nr\n<|assistant|>\n", Taught("c<|endoftext|>"),
    ],
    "blank_line": [
        "### Instruction:\n\nq\n\n### Response:\n\n", Taught("a b</s>"),
        "### Instruction:\n\nr\n\n### Response:\n\n", Taught("c</s>"),
    ],
    # The prompt's last space is a token of its own, and does not join the word behind it.
    "colon_space": ["USER: q ASSISTANT: ", Taught("a b</s>"), "USER: r ASSISTANT: ", Taught("c</s>")],
}  # fmt: skip


@pytest.mark.parametrize("family", EXACT)
def test_headers_and_ends_of_a_family_are_told_from_the_answer(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family)
    conversation = ("user", "q"), ("assistant", "a b"), ("user", "r"), ("assistant", "c")
    assert encode(encoder, *conversation) == [expected(encoder.tokenizer, *EXACT[family])]
