"""The oracle itself, on sequences made by hand under ChatML and on templates that it must refuse."""

import pytest

from tests.data.templates import oracle as judge
from tests.data.templates.chat_templates import (
    CHATML_LINES,
    NEXT_HEADER_ENDS,
    NO_END,
    PARTS,
    STRING_ARGUMENTS,
    Supervised,
    ids_of,
    with_template,
)
from tests.data.templates.corpus import CONVERSATIONS, PLAIN
from tests.data.templates.oracle import Fault, Oracle

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
}
SYSTEM = f"<|im_start|>system\nBe brief.{END}\n"
FIRST = f"{SYSTEM}{USER}Two plus two?{END}\n{ASSISTANT}"
SECOND = f"\n{USER}Thanks{END}\n{ASSISTANT}"


@pytest.fixture(scope="module")
def chatml(tokenizer_json) -> Oracle:
    return Oracle(with_template(tokenizer_json, CHATML_LINES, eos_token=END))


def sequence(oracle: Oracle, *pieces: str) -> tuple[list[int], list[int]]:
    """Return ids and labels of pieces tokenized one by one; `Supervised` pieces are supervised."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        tokens = oracle.tokenizer(piece, add_special_tokens=False).input_ids
        ids += tokens
        labels += tokens if isinstance(piece, Supervised) else [-100] * len(tokens)
    return ids, labels


def kinds(faults: list[Fault]) -> list[tuple[str, int | None]]:
    return [(fault.kind, fault.turn) for fault in faults]


def verdict(oracle: Oracle, *pieces: str, row: dict | None = None) -> list[tuple[str, int | None]]:
    return kinds(oracle.judge(row or ROW, [sequence(oracle, *pieces)]))


RIGHT = (FIRST, Supervised("Four." + END), SECOND, Supervised("Bye" + END))


def test_right_sequence_is_exact(chatml):
    assert verdict(chatml, *RIGHT) == []
    assert verdict(chatml, *RIGHT, "\n") == []


def test_a_sequence_for_each_turn_is_exact(chatml):
    first = sequence(chatml, *RIGHT[:2], "\n")
    second = sequence(chatml, FIRST, "Four." + END, *RIGHT[2:])
    assert chatml.judge(ROW, [first, second]) == []


@pytest.mark.parametrize(
    ("pieces", "faults"),
    [
        # A supervised header, whole or in part.
        (
            (FIRST[: -len("assistant\n")], Supervised("assistant\nFour." + END), *RIGHT[2:]),
            [(judge.HEADER, 2)],
        ),
        ((FIRST[:-1], Supervised("\nFour." + END), *RIGHT[2:]), [(judge.HEADER, 2)]),
        # The end token or the line break behind it.
        ((FIRST, Supervised("Four."), END, *RIGHT[2:]), [(judge.NO_END_TOKEN, 2)]),
        ((*RIGHT[:3], Supervised("Bye" + END + "\n")), [(judge.FOLLOWING, 4)]),
        # A part of the answer.
        ((FIRST, Supervised("F"), "our." + END, *RIGHT[2:]), [(judge.OTHER_TEXT, 2)]),
        ((FIRST, "F", Supervised("our." + END), *RIGHT[2:]), [(judge.CONTEXT, 2)]),
        # Another turn than the answer.
        (
            (SYSTEM + USER, Supervised("Two plus two?" + END), "\n" + ASSISTANT, *RIGHT[1:]),
            [(judge.OTHER_TEXT, None)],
        ),
        # Missing turns.
        ((*RIGHT[:2], SECOND, "Bye" + END), [(judge.MISSING, 4)]),
        (("".join(RIGHT),), [(judge.MISSING, 2), (judge.MISSING, 4)]),
        # A context without the system turn, with another text, and with a generation prompt of its own.
        ((FIRST.removeprefix(SYSTEM), *RIGHT[1:]), [(judge.CONTEXT, 2), (judge.CONTEXT, 4)]),
        ((FIRST.replace("Two", "One"), *RIGHT[1:]), [(judge.CONTEXT, 2), (judge.CONTEXT, 4)]),
        ((FIRST + "\n", *RIGHT[1:]), [(judge.CONTEXT, 2), (judge.CONTEXT, 4)]),
    ],
)
def test_wrong_sequence_is_recognized(chatml, pieces, faults):
    assert verdict(chatml, *pieces) == faults


def test_turn_that_is_supervised_twice_is_recognized(chatml):
    once = sequence(chatml, *RIGHT)
    first_again = sequence(chatml, *RIGHT[:2])
    assert kinds(chatml.judge(ROW, [once, first_again])) == [(judge.TWICE, 2)]


def test_end_token_in_pieces_is_recognized(chatml):
    ids, labels = sequence(chatml, FIRST, Supervised("Four.<|im_"), Supervised("end|>"), *RIGHT[2:])
    (cut, *others) = chatml.judge(ROW, [(ids, labels)])
    assert cut == Fault(judge.CUT, None, END)
    assert kinds(others) == [(judge.OTHER_IDS, 2), (judge.CONTEXT, 4)]


def test_other_tokens_of_the_same_text_are_recognized(chatml):
    letters = [Supervised(letter) for letter in "Four."]
    assert (judge.OTHER_IDS, 2) in verdict(chatml, FIRST, *letters, Supervised(END), *RIGHT[2:])


def test_labels_that_are_not_the_ids_are_recognized(chatml):
    ids, labels = sequence(chatml, *RIGHT)
    labels[-1] += 1
    assert kinds(chatml.judge(ROW, [(ids, labels)])) == [
        (judge.LABELS, None), (judge.MISSING, 2), (judge.MISSING, 4),
    ]  # fmt: skip


def test_turn_with_train_false_must_not_be_supervised(chatml):
    messages = [dict(message) for message in ROW["messages"]]
    messages[2]["train"] = False
    row = {"messages": messages}
    assert verdict(chatml, FIRST, "Four." + END, *RIGHT[2:], row=row) == []
    assert verdict(chatml, *RIGHT, row=row) == [(judge.NOT_TRAINED, 2)]


def test_first_turn_has_no_header_to_supervise(chatml):
    row = {"messages": ROW["messages"][2:]}
    assert verdict(chatml, ASSISTANT, *RIGHT[1:], row=row) == []
    header = "<|im_start|>", Supervised("assistant\nFour." + END)
    assert verdict(chatml, *header, *RIGHT[2:], row=row) == [(judge.HEADER, 0)]


def test_empty_system_turn_counts_as_absent(chatml):
    row = {"messages": [{"role": "system", "content": ""}, *ROW["messages"][1:]]}
    assert verdict(chatml, FIRST.removeprefix(SYSTEM), *RIGHT[1:], row=row) == []
    empty = f"<|im_start|>system\n{END}\n"
    assert verdict(chatml, empty + FIRST.removeprefix(SYSTEM), *RIGHT[1:], row=row) == [
        (judge.CONTEXT, 1), (judge.CONTEXT, 3),
    ]  # fmt: skip


CALL = {"type": "function", "function": {"name": "add", "arguments": {"text": "one"}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ]
}


def obstacles(tokenizer_json: str, template: str, row: dict, *stops: str) -> list[tuple[str, int | None]]:
    tokenizer = with_template(tokenizer_json, template, eos_token=END)
    return kinds(Oracle(tokenizer, ids_of(tokenizer, *stops)).obstacles(row))


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHATML_LINES, ROW, []),
        (CHATML_LINES, CALLS, [(judge.LOST_CONTEXT, 1), (judge.LOST_IN_TURN, 1)]),
        (CHATML_LINES, {**ROW, "tools": [CALL]}, [(judge.LOST_CONTEXT, None)]),
        (PARTS, ROW, []),
        (STRING_ARGUMENTS, CALLS, []),
        (NO_END, ROW, []),
        # The system turn is dropped.
        (
            CHATML_LINES.replace("for m in messages", "for m in messages if m.role != 'system'"),
            ROW,
            [(judge.LOST_CONTEXT, 0)],
        ),
        # The assistant turns are dropped.
        (
            CHATML_LINES.replace("m.content", "(m.content if m.role != 'assistant' else '')"),
            ROW,
            [(judge.LOST_CONTEXT, 2), (judge.LOST_IN_TURN, 2), (judge.LOST_IN_TURN, 4)],
        ),
        ("{{ raise_exception('no') }}", ROW, [(judge.UNRENDERABLE, None)]),
    ],
)
def test_obstacles_of_a_template_are_recognized(tokenizer_json, template, row, expected):
    assert obstacles(tokenizer_json, template, row) == expected


def test_header_of_the_next_turn_can_end_a_turn(tokenizer_json):
    tokenizer = with_template(tokenizer_json, NEXT_HEADER_ENDS, eos_token="<|endoftext|>")
    oracle = Oracle(tokenizer, ids_of(tokenizer, "<|user|>", "<|observation|>"))
    row = {"messages": ROW["messages"][1:3]}
    prompt = "[gMASK]<sop><|user|>\nTwo plus two?<|assistant|>\n"
    assert verdict(oracle, prompt, Supervised("Four.<|user|>"), row=row) == []
    assert verdict(oracle, prompt, Supervised("Four."), row=row) == [(judge.NO_END_TOKEN, 1)]


@pytest.mark.parametrize(
    ("prompt", "decoration", "cut", "start"),
    [
        # The same header, behind another end of the turn before it.
        ("<|end_of_text|><|assistant|>\n", "<|end_of_text|>\n<|assistant|>\n", "", ""),
        ("<|endoftext|><|im_start|>\n", "<|endoftext|><|turn|><|im_start|>", "\n", ""),
        # An opened or a closed block of thinking that the rendering lacks.
        ("<|im_start|>a\n<think>\n", "<|im_start|>a\n", "<think>\n", ""),
        ("<|im_start|>a\n<think></think>", "<|im_start|>a\n<think>", "</think>", ""),
        ("<|im_start|><think>", "<|im_start|></think>", "<think>", "</think>"),
        # Other white space.
        ("<|im_start|>   </think>", "  <|im_start|> </think>  ", "", "  "),
        # A tag of an earlier turn, and an instruction behind the messages.
        ("<turn></think>a<turn><think>", "<turn></think>a<turn></think>", "<think>", "</think>"),
        ("<|turn|>system<|turn|>a", "<|turn|>a", "", ""),
        # A long equal beginning, and no token.
        ("Be good. <|im_start|>a b", "Be good. <|im_start|>a c", "b", "c"),
        (" /off ASSISTANT:", " ASSISTANT:", "", ""),
    ],
)
def test_header_ends_where_prompt_and_rendering_share_a_text_last(chatml, prompt, decoration, cut, start):
    ends = chatml.align(prompt, decoration)
    assert (prompt[ends[0] :], decoration[ends[1] :]) == (cut, start)


def test_call_that_gets_an_id_in_history_has_an_end(tokenizer_json):
    template = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson + (']' if messages[-1] == m else ', 1]') }}
{%- endfor %}{{ (m.content or '') + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    assert obstacles(tokenizer_json, template, CALLS) == []


def test_template_that_requires_a_system_turn_has_an_end(tokenizer_json):
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML_LINES
    assert obstacles(tokenizer_json, template, ROW) == []


def test_empty_reasoning_is_rendered_as_transformers_does_also_with_a_date(tokenizer_json):
    template = CHATML_LINES.replace("m.content", "('' if m.thinking is undefined else '[]') + m.content")
    row = {"messages": [ROW["messages"][1], {**ROW["messages"][2], "reasoning_content": ""}]}
    for source in (template, "{# strftime_now #}" + template):
        oracle = Oracle(with_template(tokenizer_json, source, eos_token=END))
        prompt = f"{USER}Two plus two?{END}\n{ASSISTANT}"
        assert verdict(oracle, prompt, Supervised("[]Four." + END), row=row) == []


def test_corpus_is_large_and_its_names_are_known():
    assert len(CONVERSATIONS) >= 56
    assert set(PLAIN) <= set(CONVERSATIONS)


def test_plain_conversations_have_no_obstacle_under_chatml(chatml):
    assert {name: chatml.obstacles(CONVERSATIONS[name]) for name in PLAIN} == dict.fromkeys(PLAIN, [])
