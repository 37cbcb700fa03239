"""Prompts of prepared conversations equal those of inference, and which conversations have one."""

import json
from pathlib import Path

import pytest

from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import find_sources, prepare
from dft.data.preparing.prompts import PromptSelection, first_prompts
from dft.data.templates.encoder import ChatEncoder
from tests.data.rows import conversation, numbered, write
from tests.data.templates.chat_templates import FORGETS_REASONING, with_template

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools[0].function.name + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if style is defined %}{{ '[' + style + ']\n' }}{% endif %}{% endif %}"
)
"""Writes the name of a tool, and opens an answer by a template variable in the generation prompt only."""


@pytest.fixture
def select(prepared, encoder, tmp_path):
    """Function that returns the first prompts of rows for evaluation."""

    def run(rows, count=4, longest=1000, **options) -> PromptSelection:
        data = prepared(numbered(2, start=900), rows, **{"max_length": 512, **options})
        values = {"train": [str(tmp_path / "train.jsonl")], "eval": [str(tmp_path / "eval.jsonl")]}
        sources = find_sources(values, PrepareOptions())["eval"]
        return first_prompts(data.datasets["eval"], sources, encoder, count, longest)

    return run


def test_a_prompt_is_what_inference_gives(select, tokenizer, tmp_path):
    rows = [
        conversation("one"),
        {"messages": [*conversation("one")["messages"], *conversation("two?", "  2\n")["messages"]]},
    ]
    selection = select(rows)
    for row, prompt in zip(rows, selection.prompts, strict=True):
        before = row["messages"][:-1]
        expected = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert prompt.ids == expected
        assert prompt.text == tokenizer.decode(expected)
        assert prompt.question == before[-1]["content"]
        assert prompt.reference == row["messages"][-1]["content"].strip()
    assert [(prompt.file, prompt.line) for prompt in selection.prompts] == [
        (str(tmp_path / "eval.jsonl"), 1), (str(tmp_path / "eval.jsonl"), 2),
    ]  # fmt: skip
    assert (selection.conversations, selection.unanswered, selection.too_long) == (2, 0, 0)


def test_tools_and_template_variables_are_those_of_the_conversation(tokenizer_json, tmp_path):
    templated = with_template(tokenizer_json, WITH_TOOLS, eos_token="<|im_end|>")
    encoder = ChatEncoder(templated, variables={"style": "brief"})
    rows = [
        conversation("one", "1", tools=TOOLS),
        conversation("two", "2", tools=TOOLS, chat_template_kwargs={"style": "long"}),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    train = write(tmp_path / "train.jsonl", [conversation("three", tools=TOOLS)])
    data = prepare([train], [file], encoder, PrepareOptions(), cache_dir=tmp_path / "cache", workers=1)
    sources = find_sources({"train": [train], "eval": [file]}, PrepareOptions())["eval"]
    prompts = first_prompts(data.datasets["eval"], sources, encoder, 2, 100).prompts
    for row, prompt, style in zip(rows, prompts, ("brief", "long"), strict=True):
        text = templated.apply_chat_template(
            row["messages"][:-1], tools=TOOLS, add_generation_prompt=True, style=style, tokenize=False
        )
        assert prompt.text == text and f"[{style}]" in text and "\nadd<" in text


def test_only_conversations_that_end_with_a_trained_answer_are_used(select):
    question = {"role": "user", "content": "and?"}
    asks = {"messages": [*conversation("asks")["messages"], question]}
    untrained = {
        "messages": [*conversation("untrained")["messages"], question, {"role": "assistant", "content": "no"}]
    }
    untrained["messages"][-1]["train"] = False
    alone = {"messages": [{"role": "assistant", "content": "no prompt"}]}
    selection = select([asks, conversation("first"), untrained, alone, conversation("second")])
    assert [prompt.question for prompt in selection.prompts] == ["first", "second"]
    assert (selection.conversations, selection.unanswered) == (5, 3)


def test_the_first_of_many_are_used_and_no_more_are_read(select):
    selection = select(numbered(200), count=3)
    assert [prompt.line for prompt in selection.prompts] == [1, 2, 3]
    rows = [*numbered(150), *numbered(3, start=300)]
    for row in rows[:150]:
        row["messages"].append({"role": "user", "content": "and?"})
    selection = select(rows, count=2)  # beyond the first batch that is looked up
    assert [prompt.line for prompt in selection.prompts] == [151, 152] and selection.unanswered == 150


def test_long_prompts_are_passed_over(select):
    selection = select([conversation("long " * 30), conversation("short")], longest=40)
    assert [prompt.question for prompt in selection.prompts] == ["short"]
    assert (selection.too_long, selection.unanswered) == (1, 0)


def test_truncated_and_packed_conversations_have_whole_prompts_and_references(select):
    """The prompts are rendered again, so nothing that shapes the rows of training changes them."""
    rows = [conversation(f"question {n} " + "word " * n, "answer " * 20) for n in range(6)]
    plain = select(rows, count=6).prompts
    for options in ({"max_length": 50}, {"max_length": 50, "truncation": "left"}, {"packing": True}):
        assert select(rows, count=6, **options).prompts == plain
    assert all(prompt.reference == ("answer " * 20).strip() for prompt in plain)


def test_the_prompts_of_a_split_come_from_the_training_files(encoder, tmp_path):
    file = write(tmp_path / "train.jsonl", numbered(40))
    options = PrepareOptions(validation_split_percentage=20)
    data = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    held_out = sorted(data.datasets["eval"].origins(row)[0][1] for row in range(len(data.datasets["eval"])))
    sources = find_sources({"train": [file], "eval": []}, options)["train"]
    selection = first_prompts(data.datasets["eval"], sources, encoder, 5, 100)
    assert [prompt.line for prompt in selection.prompts] == held_out[:5]
    lines = Path(file).read_text().splitlines()
    for prompt in selection.prompts:
        assert json.loads(lines[prompt.line - 1])["messages"][0]["content"] == prompt.question


def test_conversations_on_one_line_of_an_array_are_told_apart(encoder, tmp_path):
    """`json.dump` writes a whole list on one line. One element is unusable, others are held out."""
    rows = [*numbered(12), {"messages": []}, *numbered(30, start=12)]
    file = tmp_path / "array.json"
    file.write_text(json.dumps(rows))
    options = PrepareOptions(validation_split_percentage=25, on_bad_data="skip")
    data = prepare([str(file)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    dataset = data.datasets["eval"]
    assert {tuple(dataset.origins(row)) for row in range(len(dataset))} == {((0, 1),)}
    sources = find_sources({"train": [str(file)], "eval": []}, options)["train"]
    selection = first_prompts(dataset, sources, encoder, 100, 100)
    held_out = [encoder.tokenizer.decode(row["input_ids"]) for row in dataset]
    texts = [f"{prompt.text}{prompt.reference}<|im_end|>\n" for prompt in selection.prompts]
    assert texts == held_out and len(texts) == selection.conversations > 5


def test_a_conversation_with_several_sequences_has_one_prompt(tokenizer_json, tmp_path):
    encoder = ChatEncoder(with_template(tokenizer_json, FORGETS_REASONING, eos_token="<|im_end|>"))
    think = {"role": "assistant", "content": "<think>why</think>because"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}"},
                think,
                {"role": "user", "content": "and?"},
                think,
            ]
        }
        for n in range(3)
    ]
    files = [write(tmp_path / "train.jsonl", numbered(2)), write(tmp_path / "eval.jsonl", rows)]
    for options in (PrepareOptions(), PrepareOptions(train_on_last_turn_only=True)):
        data = prepare(files[:1], files[1:], encoder, options, cache_dir=tmp_path / "cache", workers=1)
        assert len(data.datasets["eval"]) == (3 if options.train_on_last_turn_only else 6)
        sources = find_sources({"train": files[:1], "eval": files[1:]}, options)["eval"]
        selection = first_prompts(data.datasets["eval"], sources, encoder, 5, 200)
        assert [prompt.line for prompt in selection.prompts] == [1, 2, 3]
        for row, prompt in zip(rows, selection.prompts, strict=True):
            expected = encoder.tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_dict=False
            )
            assert prompt.ids == expected
