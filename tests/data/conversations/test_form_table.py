"""The table of row forms: its examples are valid, and one entry is all that a new form takes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.data.conversations import forms
from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_form import RowForm
from dft.data.conversations.turns import Row, Turn, read_turn
from dft.data.reading.data_file import DataFile
from dft.data.reading.reader import read_batches
from dft.evaluation.problems import read_problems

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


def read_pair(row: Row) -> list[Turn]:
    return [
        read_turn("question", {"role": "user", "content": row["question"]}),
        read_turn("reply", {"role": "assistant", "content": row["reply"]}),
    ]


def append_reply(row: Row, answer: str) -> Row | None:
    return {**row, "reply": answer} if "question" in row else None


PAIR = RowForm("question and reply", ("question", "reply"), read_pair, append_reply, {"question": "2 + 2?"})

OWN_FORMS = "'messages', 'conversations', 'conversation', 'instruction' with 'output', 'response'"


@pytest.fixture
def with_pair(monkeypatch) -> None:
    monkeypatch.setattr(forms, "FORMS", (*forms.FORMS, PAIR))


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_the_example_of_a_form_is_a_row_of_that_form(form):
    assert forms.find_form(form.example) is form
    assert parse_conversation(json.dumps(form.example).encode()).messages == [USER, ANSWER]
    assert form.append_answer(form.example, "5") == form.example


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_an_answer_is_appended_to_the_first_form_that_the_row_has(form):
    example = form.example
    turns = {key: value[:1] for key, value in example.items() if isinstance(value, list)}
    row = turns or {key: value for key, value in example.items() if value != "4"}
    if form is forms.QUESTION_ANSWER_PAIRS:
        row = {"conversation": [{"human": "2 + 2?"}]}
    answered = forms.append_answer(row, "4")
    assert parse_conversation(json.dumps(answered).encode()).messages == [USER, ANSWER]
    assert forms.append_answer({"text": "x"}, "4") == {"text": "x"}


def test_the_keys_of_all_forms_are_columns_that_are_read():
    assert forms.columns() == (
        "messages", "conversations", "conversation", "instruction", "output", "input", "history", "response",
        "query", "prompt", "completion", "tools", "functions", "system", "chat_template_kwargs",
        "weight", "loss_weight", "loss_scale", "sample_weight",
    )  # fmt: skip
    assert forms.describe_forms() == f"{OWN_FORMS} or 'prompt' with 'completion'"


def records(path: Path, kind: str) -> list[bytes]:
    batches = read_batches(DataFile(str(path), path, kind, None, 0))
    return [record.text for batch in batches for record in batch.records]


def test_a_form_that_is_added_to_the_table_is_read_from_every_kind_of_file(with_pair, tmp_path):
    row = {"question": "2 + 2?", "reply": "4", "system": "Add."}
    assert parse_conversation(json.dumps(row).encode()).messages == [
        {"role": "system", "content": "Add."}, USER, ANSWER,
    ]  # fmt: skip
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "id": 1}]), table)
    assert [json.loads(text) for text in records(table, "parquet")] == [row]
    # A torn first line makes the file JSON Lines only if another line is recognized as a conversation.
    lines = tmp_path / "a.json"
    lines.write_text(f'{{"question": "torn\n{json.dumps(row)}\n')
    assert len(records(lines, "json")) == 2
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"question": "2 + 2?", "answer": 4}))
    (problem,) = read_problems(problems)
    assert (problem.question, problem.reference) == ("2 + 2?", "4")


def test_a_form_that_is_added_to_the_table_is_named_in_errors(with_pair):
    assert forms.describe_forms() == f"{OWN_FORMS}, 'prompt' with 'completion' or 'question' with 'reply'"
    with pytest.raises(BadLine, match="by 'messages' and 'question' with 'reply'"):
        forms.find_form({"question": "q", "reply": "r", "messages": []})
    assert forms.find_form({"question": "q"}) is None
