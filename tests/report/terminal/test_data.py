"""Summaries of the prepared data."""

import json
from pathlib import Path

from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.report.terminal.data import data_summary
from tests.data.rows import column


def conversation(question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def prepared(
    folder: Path, tokenizer, rows: list[list[dict]], eval_rows: list[dict], limit: int
) -> PreparedData:
    files = []
    for number, group in enumerate([*rows, eval_rows]):
        files.append(folder / f"{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in group))
    names = [str(file) for file in files]
    options = PrepareOptions(max_length=limit)
    return prepare(names[:-1], names[-1:], ChatEncoder(tokenizer), options, cache_dir=folder / "c", workers=1)


def test_summary_lists_used_truncated_and_dropped_conversations(tokenizer, tmp_path):
    same, long = conversation("q", "yes"), conversation("q", "z" * 100)
    dropped, other = conversation("z" * 100, "no"), conversation("r", "no")
    data = prepared(tmp_path, tokenizer, [[same, same], [long, dropped]], [same, other], 40)
    tokens = [len(ids) for ids in column(data.datasets["train"], "input_ids")]
    supervised = [
        sum(label != -100 for label in labels) for labels in column(data.datasets["train"], "labels")
    ]
    (held_out,) = (len(ids) for ids in column(data.datasets["eval"], "input_ids"))
    share = 100 * sum(label != -100 for label in column(data.datasets["eval"], "labels")[0]) / held_out
    short = tokens[0]
    assert tokens == [short, short, 40]
    assert data_summary(data.report) == [
        f"train       3 conversations, 3 sequences, {sum(tokens)} tokens, "
        f"{100 * sum(supervised) / sum(tokens):.1f} % supervised; median {short}, 99 % up to 40, "
        "longest 40 tokens",
        "            1 of the conversations are duplicates",
        f"            {tmp_path}/0.jsonl: 2 conversations, 2 sequences, {2 * short} tokens, "
        f"{100 * supervised[0] / short:.1f} % supervised",
        f"            {tmp_path}/1.jsonl: 1 conversation, 1 sequence, 40 tokens, "
        f"{100 * supervised[2] / 40:.1f} % supervised",
        f"eval        1 conversation, 1 sequence, {held_out} tokens, {share:.1f} % supervised; "
        f"median {held_out}, 99 % up to {held_out}, longest {held_out} tokens",
        "truncated   1 conversation at --max_length 40",
        "dropped     1 conversation without supervised tokens within --max_length 40",
        f"            together {data.report['lost_supervised_tokens']} supervised tokens and 2 end-of-turn "
        "tokens lost",
        "dropped     1 eval conversation also found in the training files",
        "turns end   with <|im_end|> x 4",
    ]


def test_lost_tokens_follow_the_truncated_conversations_in_parentheses(tokenizer, tmp_path):
    rows = [conversation("q", "yes"), conversation("q", "z" * 100)]
    data = prepared(tmp_path, tokenizer, [rows], [conversation("r", "no")], 40)
    assert data_summary(data.report)[2] == (
        f"truncated   1 conversation at --max_length 40 ({data.report['lost_supervised_tokens']} supervised "
        "tokens and 1 end-of-turn token lost)"
    )


def test_each_file_is_listed_with_its_own_weight_even_if_given_twice(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(conversation(f"q{number}", "a")) + "\n" for number in range(4)))
    options = PrepareOptions(40, data_weights=(1, 0.5))
    encoder, names = ChatEncoder(tokenizer), [str(file), str(file)]
    data = prepare(names, [], encoder, options, cache_dir=tmp_path / "c", workers=1)
    lines = [line for line in data_summary(data.report) if str(file) in line]
    assert [line.endswith(", taken 0.5 times") for line in lines] == [False, True]
    assert "4 conversations" in lines[0] and "2 conversations" in lines[1]


def test_repeated_sequences_are_listed_next_to_their_conversations(tokenizer, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        rows = [conversation(f"{file.name} {number}", "a") for number in range(4)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options, encoder = PrepareOptions(40, data_weights=(2.5, 1)), ChatEncoder(tokenizer)
    data = prepare([str(file) for file in files], [], encoder, options, cache_dir=tmp_path / "c", workers=1)
    assert data.report["train"]["repeated_sequences"] == 6
    whole, first, second = data_summary(data.report)[:3]
    assert whole.startswith(
        "train       8 conversations, 14 sequences (6 of them repeated by --data_weights), "
    )
    assert ": 4 conversations, 10 sequences (6 of them repeated by --data_weights), " in first
    assert first.endswith(", taken 2.5 times")
    assert ": 4 conversations, 4 sequences, " in second and "taken" not in second


def test_turns_without_a_stop_token_cause_a_warning(tokenizer, tmp_path):
    data = prepared(tmp_path, tokenizer, [[conversation("q", "a")]], [conversation("r", "b")], 40)
    report = {**data.report, "turns_without_stop_token": 1200, "end_of_turn_tokens": {}}
    assert data_summary(report)[-1].startswith("warning     1,200 turns without a stop token, ")
    assert len(data_summary(report)) == 3
