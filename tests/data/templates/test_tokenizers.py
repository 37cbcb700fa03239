"""Tokenizers that add, drop, merge or mark characters, and tokenizers that cannot be used."""

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from dft.data.batches.collator import PaddedCollator
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from tests.data.templates.chat_templates import (
    CHATML_LINES,
    MERGES_SYSTEM,
    OPENS_THINKING,
    Supervised,
    encode,
    encoder_of,
    expected,
    with_template,
)

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


def test_bos_that_the_tokenizer_adds_is_not_duplicated(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    encoder = encoder_of(backend.to_str(), MERGES_SYSTEM, eos_token="<end_of_turn>", bos_token="<bos>")
    ((ids, labels),) = encode(encoder, ("user", "q"), ("assistant", "a"))
    assert ids.count(bos) == 1 and ids[0] == bos and labels[0] == -100


def test_end_tokens_are_supervised_and_padding_is_not_if_both_are_the_same_token(tokenizer_json):
    encoder = encoder_of(tokenizer_json, CHATML_LINES, eos_token=END, pad_token=END)
    end = encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.pad_token_id == end
    short, long = (encode(encoder, ("user", "q"), ("assistant", answer))[0] for answer in ("a", "a b c d e"))
    batch = PaddedCollator(pad_token_id=end)(
        [{"input_ids": ids, "labels": labels} for ids, labels in (short, long)]
    )
    (ids, labels), padding = short, len(long[0]) - len(short[0])
    assert padding > 0 and ids.count(end) == 2 and labels.count(end) == 1
    assert batch["input_ids"][0].tolist() == ids + [end] * padding
    assert batch["labels"][0].tolist() == labels + [-100] * padding
    assert batch["attention_mask"][0].tolist() == [1] * len(ids) + [0] * padding


def test_offsets_without_white_space_do_not_move_the_span(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    encoder = encoder_of(backend.to_str(), CHATML_LINES, eos_token=END)
    assert encode(encoder, ("user", "q"), ("assistant", "  two words ")) == [
        expected(
            encoder.tokenizer, USER + "q" + END + "\n" + ASSISTANT, Supervised("  two words " + END), "\n"
        )
    ]


def test_conversation_unrolls_where_a_token_would_straddle_header_and_answer(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    encoder = encoder_of(backend.to_str(), CHATML_LINES, eos_token=END)
    conversation = ("user", "\n\nq"), ("assistant", "\nword\n\nx"), ("user", "r"), ("assistant", "\n")
    assert encode(encoder, *conversation) == [
        expected(
            encoder.tokenizer, USER + "\n\nq" + END + "\n" + ASSISTANT, Supervised("\nword\n\nx" + END)
        ),
        expected(
            encoder.tokenizer, USER + "\n\nq" + END + "\n" + ASSISTANT + "\nword\n\nx" + END + "\n" + USER
            + "r" + END + "\n" + ASSISTANT, Supervised("\n" + END),
        ),
    ]  # fmt: skip


def test_characters_changed_by_a_normalizer_do_not_move_the_span(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\r", "")])
    encoder = encoder_of(backend.to_str(), CHATML_LINES, eos_token=END)
    assert encode(encoder, ("user", "e\u0301\r"), ("assistant", "\re\u0301 x\r")) == [
        expected(encoder.tokenizer, USER + "é" + END + "\n" + ASSISTANT, Supervised("é x" + END), "\n")
    ]


def test_truncation_of_the_tokenizer_is_neither_applied_nor_changed(tokenizer_json):
    tokenizer = with_template(tokenizer_json, CHATML_LINES, eos_token=END)
    tokenizer.backend_tokenizer.enable_truncation(4)
    ((ids, _),) = encode(ChatEncoder(tokenizer), ("user", "a long question"), ("assistant", "a long answer"))
    assert len(ids) > 4
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4


def test_stop_ids_outside_the_vocabulary_are_ignored(tokenizer):
    encoder = ChatEncoder(tokenizer, [10_000_000])
    assert encode(encoder, ("user", "q"), ("assistant", "a")) == encode(
        ChatEncoder(tokenizer), ("user", "q"), ("assistant", "a")
    )


def test_tokenizer_without_offsets_raises(tokenizer_json):
    tokenizer = with_template(tokenizer_json, CHATML_LINES, eos_token=END)

    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(UserError, match="Slow is a slow tokenizer"):
        ChatEncoder(tokenizer)


def test_tokenizer_without_a_template_raises(tokenizer_json):
    with pytest.raises(UserError, match="no chat template; pass --chat_template FILE"):
        ChatEncoder(with_template(tokenizer_json, None, eos_token=END))
    several = with_template(tokenizer_json, {"rag": CHATML_LINES, "tool_use": CHATML_LINES}, eos_token=END)
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and no default"):
        ChatEncoder(several)


def test_tokenizer_that_adds_a_space_before_text_is_masked_exactly(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    template = OPENS_THINKING.replace("<think>\\n", "")
    encoder = encoder_of(backend.to_str(), template, "<|end|>", eos_token="<|endoftext|>")
    assert encode(encoder, ("user", "q"), ("assistant", "word")) == [
        expected(encoder.tokenizer, "<|user|>q<|assistant|>", Supervised("word<|end|>"))
    ]
