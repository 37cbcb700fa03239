"""Which tokens are supervised, asserted id by id against pieces of text that are tokenized one by one."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from dft.data.chat import ChatEncoder
from dft.data.faults import BadLine
from dft.errors import UserError
from tests.data.chat_templates import (
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
    encode,
    examples_of,
    expected,
    ids_of,
    plain,
    with_template,
)

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@pytest.fixture(scope="module")
def chatml(tokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def encoder_of(tokenizer_json: str, template: str, *stops: str, **options: str) -> ChatEncoder:
    tokenizer = with_template(tokenizer_json, template, **options)
    return ChatEncoder(tokenizer, ids_of(tokenizer, *stops))


# ---- ChatML ----


def test_a_single_answer_is_supervised_with_its_end_token(chatml, tokenizer):
    prompt = USER + "What is two plus two?" + END + "\n" + ASSISTANT
    assert encode(chatml, ("user", "What is two plus two?"), ("assistant", "Four.")) == [
        expected(tokenizer, prompt, Taught("Four." + END), "\n")
    ]


def test_all_assistant_turns_are_supervised_but_no_system_or_tool_turn(chatml, tokenizer):
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
            Taught("add(1, 2)<|im_end|>"),
            "\n<|im_start|>tool\n3<|im_end|>\n" + ASSISTANT,
            Taught("It is 3.<|im_end|>"),
            "\n<|im_start|>user\nThanks<|im_end|>\n" + ASSISTANT,
            Taught("Bye<|im_end|>"),
            "\n",
        )
    ]


@pytest.mark.parametrize(
    "answer",
    ["Grüße aus Köln", "👩‍👩‍👧‍👦 🇩🇪", "e\u0301a\u0308 ﷺ", "日本語の文章。", "\u00a0x\u200b", "a\r\nb\tc"],
)
def test_characters_of_several_bytes_are_supervised_whole(chatml, tokenizer, answer):
    assert encode(chatml, ("user", "🙂 é"), ("assistant", answer)) == [
        expected(tokenizer, USER + "🙂 é" + END + "\n" + ASSISTANT, Taught(answer + END), "\n")
    ]


def test_a_conversation_may_open_with_the_assistant(chatml, tokenizer):
    assert encode(chatml, ("assistant", "Hello"), ("user", "Hi"), ("assistant", "Yes?")) == [
        expected(
            tokenizer, ASSISTANT, Taught("Hello" + END), "\n" + USER + "Hi" + END + "\n" + ASSISTANT,
            Taught("Yes?" + END), "\n",
        )
    ]  # fmt: skip


def test_two_answers_in_a_row_are_both_supervised(chatml, tokenizer):
    assert encode(chatml, ("user", "Go"), ("assistant", "One"), ("assistant", "Two")) == [
        expected(
            tokenizer, USER + "Go" + END + "\n" + ASSISTANT, Taught("One" + END), "\n" + ASSISTANT,
            Taught("Two" + END), "\n",
        )
    ]  # fmt: skip


@pytest.mark.parametrize("answer", ["i", "m", "_", "end", "im_end", "<", "<|", "|>", ">", "assistant", "0"])
def test_a_short_answer_is_not_confused_with_the_letters_of_the_end_token(chatml, tokenizer, answer):
    assert encode(chatml, ("user", answer), ("assistant", answer), ("user", "x"), ("assistant", answer)) == [
        expected(
            tokenizer, USER + answer + END + "\n" + ASSISTANT, Taught(answer + END),
            "\n" + USER + "x" + END + "\n" + ASSISTANT, Taught(answer + END), "\n",
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
def test_markers_in_a_question_open_no_span_and_shift_none(chatml, tokenizer, question):
    for role in ("user", "system", "tool"):
        header = f"<|im_start|>{role}\n"
        conversation = ("user", "q"), (role, question), ("assistant", "Four."), ("user", question)
        assert encode(chatml, *conversation) == [
            expected(
                tokenizer, USER + "q" + END + "\n" + header + question + END + "\n" + ASSISTANT,
                Taught("Four." + END), "\n" + USER + question + END + "\n",
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
def test_markers_in_an_answer_do_not_end_its_span(chatml, tokenizer, answer):
    assert encode(chatml, ("user", "q"), ("assistant", answer), ("user", "r"), ("assistant", "s")) == [
        expected(
            tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught(answer + END),
            "\n" + USER + "r" + END + "\n" + ASSISTANT, Taught("s" + END), "\n",
        )
    ]  # fmt: skip


def test_a_stop_token_inside_tool_arguments_does_not_end_the_call(chatml, tokenizer):
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "<|im_end|>", "times": 2}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Calling", "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "i"},
    ]
    ((example,),) = chatml.encode([messages])
    assert plain(example) == expected(
        tokenizer,
        USER + "q" + END + "\n" + ASSISTANT,
        Taught(
            'Calling\n<tool_call>\n{"name": "say", "arguments": {"text": "<|im_end|>", "times": 2}}'
            "\n</tool_call><|im_end|>"
        ),
        "\n<|im_start|>tool\nok" + END + "\n" + ASSISTANT,
        Taught("i" + END),
        "\n",
    )


@pytest.mark.parametrize(("content", "arguments"), [("", '{"<|im_end|>": 1}'), ("x", '{"<|im_end|>": "i"}')])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_stop_token_in_the_key_of_an_argument_does_not_end_the_call(
    chatml, tokenizer, content, arguments, as_text
):
    call = {"name": "say<|im_end|>", "arguments": arguments if as_text else json.loads(arguments)}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    ((example,),) = chatml.encode([[{"role": "user", "content": "q"}, answer]])
    written = f'<tool_call>\n{{"name": "say<|im_end|>", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    assert plain(example) == expected(
        tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught(content + "\n" * bool(content) + written), "\n"
    )


def test_tool_calls_without_content_are_supervised(chatml, tokenizer):
    call = {"name": "now", "arguments": "{}"}
    answer = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    messages = [{"role": "user", "content": "q"}, answer]
    ((example,),) = chatml.encode([messages])
    written = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert plain(example) == expected(
        tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught(f"{written}\n{written}{END}"), "\n"
    )


def test_a_conversation_that_the_template_cannot_render_is_told_apart_from_the_others(chatml):
    broken = [{"role": "user", "content": "q"}, {"role": "assistant", "content": 5}]
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    first, second, third = chatml.encode([good, broken, good])
    assert isinstance(second, BadLine)
    assert str(second).startswith("the chat template fails on the conversation: TypeError: ")
    assert plain(first[0]) == plain(third[0])


# ---- templates of other families ----


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
    from dft.data.rendering import has_generation_tags

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
    call = {"role": "assistant", "content": "f()", "tool_calls": [{"name": "f", "arguments": {}}]}
    ((example,),) = encoder.encode([[{"role": "user", "content": "q"}, call]])
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
    ((example,),) = encoder.encode([messages])
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
    (refused,) = encoder.encode([[{"role": role, "content": "c"} for role in roles]])
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
    (refused,) = encoder.encode([messages])
    assert isinstance(refused, BadLine) and str(refused).startswith("messages[1] holds special tokens")


# ---- tokenizers ----


def test_bos_that_the_tokenizer_adds_by_itself_is_not_doubled(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    encoder = encoder_of(backend.to_str(), MERGES_SYSTEM, eos_token="<end_of_turn>", bos_token="<bos>")
    ((ids, labels),) = encode(encoder, ("user", "q"), ("assistant", "a"))
    assert ids.count(bos) == 1 and ids[0] == bos and labels[0] == -100


def test_offsets_that_leave_out_white_space_do_not_move_the_border(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    encoder = encoder_of(backend.to_str(), CHATML_LINES, eos_token=END)
    assert encode(encoder, ("user", "q"), ("assistant", "  two words ")) == [
        expected(encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Taught("  two words " + END), "\n")
    ]


def test_a_token_that_straddles_header_and_answer_belongs_to_the_prompt(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    encoder = encoder_of(backend.to_str(), CHATML_LINES, eos_token=END)
    assert encode(encoder, ("user", "q"), ("assistant", "\nword")) == [
        expected(encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT + "\n", Taught("word" + END), "\n")
    ]


def test_characters_dropped_or_composed_by_a_normalizer_do_not_move_the_border(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\r", "")])
    encoder = encoder_of(backend.to_str(), CHATML_LINES, eos_token=END)
    assert encode(encoder, ("user", "e\u0301\r"), ("assistant", "\re\u0301 x\r")) == [
        expected(encoder.tokenizer, USER + "é" + END + "\n" + ASSISTANT, Taught("é x" + END), "\n")
    ]


def test_truncation_and_padding_of_the_tokenizer_are_left_alone_and_not_applied(tokenizer_json):
    tokenizer = with_template(tokenizer_json, CHATML_LINES, eos_token=END)
    tokenizer.backend_tokenizer.enable_truncation(4)
    ((ids, _),) = encode(ChatEncoder(tokenizer), ("user", "a long question"), ("assistant", "a long answer"))
    assert len(ids) > 4
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4


def test_stop_ids_outside_the_vocabulary_are_passed_over(tokenizer):
    encoder = ChatEncoder(tokenizer, [10_000_000])
    assert encode(encoder, ("user", "q"), ("assistant", "a")) == encode(
        ChatEncoder(tokenizer), ("user", "q"), ("assistant", "a")
    )


def test_a_tokenizer_without_offsets_is_refused(tokenizer_json):
    tokenizer = with_template(tokenizer_json, CHATML_LINES, eos_token=END)

    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(UserError, match="Slow is a slow tokenizer"):
        ChatEncoder(tokenizer)


def test_a_tokenizer_without_a_template_is_refused(tokenizer_json):
    with pytest.raises(UserError, match="no chat template; pass --chat_template FILE"):
        ChatEncoder(with_template(tokenizer_json, None, eos_token=END))
    several = with_template(tokenizer_json, {"rag": CHATML_LINES, "tool_use": CHATML_LINES}, eos_token=END)
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and no default"):
        ChatEncoder(several)


def test_a_vocabulary_that_marks_spaces_at_the_front_is_masked_exactly(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoder = encoder_of(backend.to_str(), OPENS_THINKING, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", "word")) == [
        expected(encoder.tokenizer, "<|user|>q<|assistant|>", Taught("word<|end|>"))
    ]
