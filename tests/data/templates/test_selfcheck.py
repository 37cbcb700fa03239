"""The self-check accepts correct sequences of any content and rejects wrong ones."""

import random
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.rendering import Rendering
from dft.data.templates.selfcheck import check_conversation, check_sequence
from dft.data.templates.text_tokenizer import TokenizedText
from dft.errors import UserError
from tests.conftest import CORPUS, SPECIAL_TOKENS
from tests.data.templates.chat_templates import FAMILIES, encoder_for, talk, turn

PIECES = [
    "a", "Two is four", " ", "  ", "\n", "\n\n", "é", "e\u0301", "🙂", "日本", "<|im_end|>", "<|im_start|>",
    "assistant\n", "</s>", "<|end|>", "<|user|>", "0", "\t", "\u00a0", "[INST]", "ASSISTANT: ", "x" * 30,
    "\u2028", "\u2581",
]  # fmt: skip


def metaspace(template: str, **names: str) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer that marks spaces and adds one before every text, like SentencePiece."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", *SPECIAL_TOKENS], show_progress=False
    )
    backend.train_from_iterator([CORPUS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def byte_fallback(template: str, **names: str) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with marked spaces and byte fallback, like Llama 2's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *SPECIAL_TOKENS, *alphabet], show_progress=False
    )
    backend.train_from_iterator([CORPUS.replace(" ", "▁")] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def check_all(encoder: ChatEncoder, conversations: list[Conversation]) -> None:
    """Check all conversations that the template can render."""
    for sequences in encoder.sequences(conversations):
        if not isinstance(sequences, BadLine):
            check_conversation(encoder, sequences)


def tokenized(encoder: ChatEncoder, rendering: Rendering) -> TokenizedText:
    """Return the tokens of a whole rendering."""
    return TokenizedText(rendering.text, encoder.backend.encode(rendering.text, add_special_tokens=False))


def random_conversation(generator: random.Random) -> Conversation:
    def words() -> str:
        return "".join(generator.choices(PIECES, k=generator.randint(1, 5)))

    messages = []
    for _ in range(generator.randint(1, 3)):
        messages.append(turn("user", f"q{words()}"))
        messages.append(turn("assistant", generator.choice(["", "a"]) + words() + "b"))
    return talk(messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_conversations_pass_with_every_template(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family, {"date_string": "1 May"})
    generator = random.Random(family)
    check_all(encoder, [random_conversation(generator) for _ in range(60)])


@pytest.mark.parametrize("make", [metaspace, byte_fallback])
@pytest.mark.parametrize("family", ["chatml", "opens_thinking", "eos_behind_answers", "colon_space", "parts"])
def test_random_conversations_pass_with_tokenizers_that_mark_spaces(make, family):
    template, stops, names = FAMILIES[family]
    tokenizer = make(template, **names)
    encoder = ChatEncoder(tokenizer, [tokenizer.get_vocab()[stop] for stop in stops])
    generator = random.Random(family)
    check_all(encoder, [random_conversation(generator) for _ in range(60)])


def test_tokens_that_absorb_white_space_pass(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, lstrip=True, special=True)])
    encoder = encoder_for(backend.to_str(), "chatml")
    generator = random.Random(0)
    check_all(encoder, [random_conversation(generator) for _ in range(60)])


def test_added_token_that_straddles_prompt_and_completion_passes(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    encoder = encoder_for(backend.to_str(), "chatml")
    check_all(encoder, [talk([turn("user", "q"), turn("assistant", "\nb")])])


@pytest.fixture
def correct(tokenizer_json):
    """Return an encoder with the rendering and the example of one correct conversation."""
    encoder = encoder_for(tokenizer_json, "chatml")
    turns = [turn("user", "q"), turn("assistant", "Two is four"), turn("user", "r"), turn("assistant", "b c")]
    (rendering,) = encoder.renderer.render(talk(turns))
    example = encoder.example(rendering, tokenized(encoder, rendering))
    check_sequence(encoder, rendering, example)
    return encoder, rendering, example


def test_spans_that_are_off_by_one_are_detected(correct):
    encoder, rendering, _ = correct
    text = tokenized(encoder, rendering)
    for before, behind in ((-1, 0), (1, 0), (0, -10), (0, 1), (-11, 0)):
        moved = replace(rendering, spans=[(start + before, end + behind) for start, end in rendering.spans])
        with pytest.raises(UserError):
            check_sequence(encoder, rendering, encoder.example(moved, text))


def test_spans_out_of_order_are_detected(tokenizer_json):
    encoder = encoder_for(tokenizer_json, "chatml")
    ((sequence,),) = encoder.sequences([talk([turn("user", "q"), turn("assistant", "Two is four")])])
    rendering, example = sequence
    (last,) = example.ends.tolist()
    rendering = replace(rendering, spans=rendering.spans * 2, endings=rendering.endings * 2)
    example = replace(example, endings=example.endings * 2, ends=np.array([last, last - 1], dtype=np.int32))
    with pytest.raises(UserError, match="assistant turn 2 has no supervised token of its own"):
        check_sequence(encoder, rendering, example)


def test_labels_that_do_not_match_the_text_are_detected(correct):
    encoder, rendering, example = correct
    first = int((example.labels != -100).argmax())

    def changed(at: int, value: int) -> object:
        labels = example.labels.copy()
        labels[at] = value
        return replace(example, labels=labels)

    for at, value, message in (
        (first, -100, "are not those of its prompt|has no supervised token|are .* but it is rendered"),
        (first + 1, -100, "no supervised token of its own, or a gap"),
        (1, int(example.input_ids[1]), "no supervised token of its own, or a gap"),
        (len(example.labels) - 1, int(example.input_ids[-1]), "tokens outside of the assistant turns"),
        (first, 7, "a label differs from the token at its position"),
    ):
        with pytest.raises(UserError, match=message):
            check_sequence(encoder, rendering, changed(at, value))


def test_end_token_other_than_the_stop_token_is_detected(correct):
    encoder, rendering, example = correct
    shorter = replace(rendering, endings=["<|endoftext|>", "<|im_end|>"])
    with pytest.raises(UserError, match="turn 1 should end with the token <|endoftext|>, but its last super"):
        check_sequence(encoder, shorter, example)


def test_tokens_that_differ_from_the_prompt_are_detected(correct):
    encoder, rendering, example = correct
    ids = example.input_ids.copy()
    ids[2] = ids[0]
    with pytest.raises(UserError, match="the tokens before assistant turn 1 are not those of its prompt"):
        check_sequence(encoder, rendering, replace(example, input_ids=ids))
    ids = example.input_ids.copy()
    ids[-1] = ids[0]
    with pytest.raises(UserError, match="the tokens of the conversation decode to"):
        check_sequence(encoder, rendering, replace(example, input_ids=ids))
