"""Training sequences under templates with unusual behavior: id for id, and as the oracle judges them."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from tests.data.templates.case_templates import CASES, EXTRA_TOKENS
from tests.data.templates.chat_templates import (
    FAMILIES,
    Supervised,
    encoder_for,
    expected,
    ids_of,
    with_template,
)
from tests.data.templates.corpus import CONVERSATIONS, PLAIN
from tests.data.templates.oracle import Oracle


@pytest.fixture(scope="module")
def extended_json(tokenizer_json: str) -> str:
    """The test tokenizer with `EXTRA_TOKENS`."""
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_tokens([AddedToken(token, normalized=False) for token in EXTRA_TOKENS])
    return backend.to_str()


def tokenizer_of(extended_json: str, template: str) -> PreTrainedTokenizerFast:
    return with_template(extended_json, template, eos_token="<|im_end|>")


def up_to_the_last_turn(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Cut a sequence behind its last supervised token; what follows it is never learned."""
    size = max(index for index, label in enumerate(labels) if label != -100) + 1
    return ids[:size], labels[:size]


@pytest.mark.parametrize("name", CASES)
def test_sequences_are_those_of_inference(extended_json, name):
    template, row, wanted, stop_tokens = CASES[name]
    tokenizer = tokenizer_of(extended_json, template)
    stops = ids_of(tokenizer, *stop_tokens)
    oracle = Oracle(tokenizer, stops)
    (result,) = ChatEncoder(tokenizer, stops).encode([parse_conversation(json.dumps(row).encode())])
    if isinstance(wanted, str):
        assert isinstance(result, BadLine), result
        assert result.kind == wanted
        assert oracle.obstacles(row, doubts=True)
        return
    assert isinstance(result, list), result
    sequences = [(example.input_ids.tolist(), example.labels.tolist()) for example in result]
    assert [up_to_the_last_turn(*sequence) for sequence in sequences] == [
        expected(tokenizer, *pieces) for pieces in wanted
    ]
    assert oracle.judge(row, sequences) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "<think>" in case.template])
def test_tags_that_are_no_tokens_are_cut_nowhere_either(tokenizer_json, name):
    template, row, wanted, _ = CASES[name]
    tokenizer = tokenizer_of(tokenizer_json, template)
    (result,) = ChatEncoder(tokenizer).encode([parse_conversation(json.dumps(row).encode())])
    if isinstance(wanted, str):
        assert isinstance(result, BadLine) and result.kind == wanted
        return
    assert isinstance(result, list), result
    texts = [
        tokenizer.decode(example.input_ids[example.labels != -100], clean_up_tokenization_spaces=False)
        for example in result
    ]
    assert texts == ["".join(piece for piece in pieces if isinstance(piece, Supervised)) for pieces in wanted]
    sequences = [(example.input_ids.tolist(), example.labels.tolist()) for example in result]
    assert Oracle(tokenizer).judge(row, sequences) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_of_every_kind_are_exact_or_refused_for_a_reason(tokenizer_json, family):
    encoder = encoder_for(tokenizer_json, family)
    oracle = Oracle(encoder.tokenizer, ids_of(encoder.tokenizer, *FAMILIES[family].stops))
    wrong, refused = {}, {}
    for name, row in CONVERSATIONS.items():
        (result,) = encoder.encode([parse_conversation(json.dumps(row).encode())])
        if isinstance(result, BadLine):
            if name in PLAIN or not oracle.obstacles(row, doubts=True):
                refused[name] = str(result)
            continue
        sequences = [(example.input_ids.tolist(), example.labels.tolist()) for example in result]
        if faults := oracle.judge(row, sequences):
            wrong[name] = faults
    assert (wrong, refused) == ({}, {})
