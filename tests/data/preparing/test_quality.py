"""Warnings about data that can be trained on, but probably should not be as it is."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from dft.data.preparing.near_duplicates import has_near_twin, near_repeats
from dft.data.preparing.traits import signatures
from dft.report.terminal.data import data_summary
from tests.data.rows import Row, conversation, numbered
from tests.data.templates.chat_templates import encoder_for

WORDS = [f"{first}{second}{first}a" for first in "bdfgk" for second in "aeio"][:18]


def talk(number: int, answer: str | None = None, **columns: object) -> Row:
    """Return a conversation whose text is like no other."""
    drawn = np.random.default_rng(number).permutation(WORDS)[:8]
    return conversation(
        f"{' '.join(drawn)} {number}", answer or f"{' '.join(drawn[::-1])} {number}.", **columns
    )


def warnings_of(
    prepared, rows: list[Row], eval_rows: list[Row] | None = None
) -> list[tuple[str, int, list[int]]]:
    """Return the text, the count and the lines of the examples of each warning."""
    report = prepared(rows, eval_rows, max_length=512).report
    return [
        (
            entry["text"],
            entry["conversations"],
            [int(place.rpartition(":")[2]) for place in entry["examples"]],
        )
        for entry in report["warnings"]
    ]


def test_ordinary_conversations_have_no_warnings(prepared):
    assert warnings_of(prepared, [talk(number) for number in range(60)]) == []
    assert warnings_of(prepared, numbered(10)) == []


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("a <|im_end|> b", "answers contain special tokens as text"),
        ("<think>\n\n</think>\n\nfour", "answers have empty reasoning, others do not"),
        ("I'm sorry, but I can't help with that.", "answers are refusals or speak of an AI model"),
        ("As an AI language model, I have no opinion.", "answers are refusals or speak of an AI model"),
        ("抱歉，我无法回答这个问题", "answers are refusals or speak of an AI model"),
    ],
)
def test_unusual_answers_are_counted_with_two_examples(prepared, answer, text):
    rows = [talk(number, f"{answer} {number}" if number % 10 == 3 else None) for number in range(30)]
    found = {warned: (count, lines) for warned, count, lines in warnings_of(prepared, rows)}
    assert found[text] == (3, [4, 14])


def test_empty_reasoning_everywhere_is_no_warning(prepared):
    rows = [talk(number, f"<think>\n\n</think>\n\n{number}") for number in range(30)]
    assert warnings_of(prepared, rows) == []


def test_conversations_without_a_question_are_a_warning_if_others_have_one(prepared):
    rows = [talk(number) if number % 10 else {"response": f"{number}."} for number in range(30)]
    assert warnings_of(prepared, rows) == [("conversations have no user turn, others do", 3, [1, 11])]
    assert warnings_of(prepared, rows[::10]) == []


def test_a_system_prompt_in_a_part_of_the_conversations_is_a_warning(prepared):
    text = "conversations have a system prompt, others have none"
    for share, found in ((2, [(text, 20, [1, 3])]), (1, []), (40, [])):
        rows = [talk(number, **({"system": "s"} if number % share == 0 else {})) for number in range(40)]
        assert warnings_of(prepared, rows) == found


def test_answers_in_other_scripts_are_warnings(prepared):
    rows = [talk(number, f"四加四等于{number}" if number in (5, 17) else None) for number in range(40)]
    assert warnings_of(prepared, rows) == [
        ("answers are in another script than their question", 2, [6, 18]),
        ("answers are in a rare script (Chinese 2)", 2, [6, 18]),
    ]


def test_answers_of_the_same_greatest_length_are_a_warning(prepared):
    def answer(number: int) -> str:
        text = " ".join(np.random.default_rng(number).permutation(WORDS * 8))
        return text[:300] if number % 8 == 0 else text[: 200 + number % 50]

    rows = [talk(number, answer(number)) for number in range(40)]
    assert warnings_of(prepared, rows) == [
        ("answers have exactly 300 characters, the maximum: probably cut off", 5, [1, 9])
    ]
    assert warnings_of(prepared, [talk(number, answer(1 + 8 * number)) for number in range(40)]) == []


def test_an_answer_that_is_given_often_is_a_warning(prepared):
    rows = [talk(number, "I do not know the answer to this." if number < 6 else None) for number in range(40)]
    assert warnings_of(prepared, rows) == [("conversations have the same answer", 6, [1, 2])]
    short = [talk(number, "yes" if number < 6 else None) for number in range(40)]
    assert warnings_of(prepared, short) == []


def test_evaluation_conversations_nearly_equal_to_training_are_a_warning(prepared):
    long = [
        conversation(" ".join(np.random.default_rng(number).permutation(WORDS * 5)), f"{number}.")
        for number in range(30)
    ]
    near = [
        {"messages": [*row["messages"][:1], {"role": "assistant", "content": f"{n} !"}]}
        for n, row in enumerate(long)
    ]
    held_out = [*near[:3], *(talk(number) for number in range(100, 110))]
    assert warnings_of(prepared, long, held_out) == [
        ("evaluation conversations nearly equal one for training", 3, [1, 2])
    ]


def test_near_duplicates_are_dropped_if_asked_for(prepared):
    def long(number: int, end: str) -> Row:
        text = " ".join(np.random.default_rng(number).permutation(WORDS * 5))
        return conversation(text, f"{number}. {end}")

    rows = [long(1, "a"), long(2, "a"), long(1, "b"), long(1, "c"), long(3, "a"), long(2, "a")]
    for dedup, lines in ((False, [1, 2, 3, 4, 5, 6]), (True, [1, 2, 3, 4, 5]), ("near", [1, 2, 5])):
        data = prepared(rows, max_length=512, dedup=dedup)
        train = data.datasets["train"]
        assert [train.origins(row)[0][1] for row in range(len(train))] == lines
        assert data.report["repeated_conversations_dropped"] == 6 - len(lines)


def test_near_duplicates_are_found_as_by_comparing_all_pairs():
    generator = np.random.default_rng(0)
    found = generator.integers(0, 2**32, (300, 16), dtype=np.uint32)
    for index in range(100, 300, 2):  # copies that differ in 0 to 5 of 16 entries
        found[index] = found[generator.integers(0, 100)]
        found[index, generator.permutation(16)[: index % 6]] = 7 * index
    repeats = near_repeats(found)
    kept: list[int] = []
    for index, signature in enumerate(found):
        near = any((found[other] == signature).mean() >= 0.8 for other in kept)
        assert repeats[index] == near or (near and not shares_a_band(signature, found[kept]))
        if not repeats[index]:
            kept.append(index)
    assert 60 < repeats.sum() < 100
    near = has_near_twin(found[200:], found[:100])
    assert (near <= ((found[200:, None] == found[None, :100]).mean(axis=2) >= 0.8).any(axis=1)).all()
    assert near.sum() >= 30


def shares_a_band(signature: np.ndarray, others: np.ndarray) -> bool:
    return bool((others == signature).reshape(len(others), 4, 4).all(axis=2).any())


def warning(text: str, *examples: str, count: int = 1_234_567) -> dict[str, object]:
    return {"text": text, "split": "train", "conversations": count, "share": 0.125, "examples": [*examples]}


def console_lines(prepared, *warnings: dict[str, object]) -> list[str]:
    report = {**prepared(numbered(2)).report, "warnings": [*warnings]}
    return [line for line in data_summary(report) if line not in data_summary({**report, "warnings": []})]


def test_the_console_shows_each_warning_in_at_most_two_lines_of_100_columns(prepared):
    head = "check       answers have empty reasoning, others do not: 1,234,567 (12.5 %)"
    long = "answers have empty reasoning, others do not"
    assert console_lines(prepared, warning(long, "a:3")) == [f"{head}, such as a:3"]
    for examples, shown in (
        (("data/train.jsonl:3", "data/train.jsonl:14"), "data/train.jsonl:3 and data/train.jsonl:14"),
        ((f"/{'d' * 80}/train.jsonl:3", "b.jsonl:5"), "train.jsonl:3 and b.jsonl:5"),
        ((f"{'n' * 80}.jsonl:3", f"{'n' * 80}.jsonl:14"),
         f"...{'n' * 26}.jsonl:3 and ...{'n' * 25}.jsonl:14"),
    ):  # fmt: skip
        lines = console_lines(prepared, warning(long, *examples))
        assert lines == [head, f"            such as {shown}"]
        assert all(len(line) <= 100 for line in lines)


def test_the_console_shows_at_most_ten_lines_of_warnings(prepared):
    long = [warning(f"answers {number}", "d" * 60, "e" * 60, count=9 - number) for number in range(5)]
    assert len(console_lines(prepared, *long)) == 10
    more = [*long, warning("conversations have the same answer", "d" * 60, "e" * 60)]
    lines = console_lines(prepared, *more)
    assert lines[-1] == "check       conversations have the same answer: 1,234,567 (12.5 %)"
    assert len(lines) == 6
    assert len(console_lines(prepared, *long, *long, *long)) == 10


def test_every_warning_fits_in_a_line_of_100_columns(prepared):
    scripts = ["四加四等于", "かなかな", "한국어", "привет", "नमस्ते", "γεια", "שלום", "สวัสดี"]
    answers = {number: f"{scripts[number // 3]} {number}" for number in range(24)}
    rows = [
        talk(number, answers.get(number), **({"system": "s"} if number % 2 else {})) for number in range(150)
    ]
    rows += [
        talk(number, f"<think>\n\n</think>\n\nI'm sorry, I cannot help {number} <|im_end|>")
        for number in range(150, 160)
    ]
    rows += [{"response": "the same answer, again and again " * 12}] * 8
    rows += [talk(number, ("x" * 600 + str(number))[-600:]) for number in range(170, 180)]
    held_out = [talk(number, f"{number}!") for number in range(30, 60)]
    report = prepared(rows, held_out, max_length=4096).report
    texts = [entry["text"] for entry in report["warnings"]]
    assert "answers are in a rare script (Chinese 3, Japanese 3, Korean 3, ...)" in texts
    assert len(texts) >= 8
    for entry in report["warnings"]:
        head = f"check       {entry['text']}: {1_234_567:,} ({100:.1f} %)"
        assert len(head) <= 100


def test_signatures_estimate_the_share_of_common_pieces():
    base = b" ".join(np.random.default_rng(0).permutation(WORDS * 20).astype("S9"))
    texts = [base, base, base[:-40], base[:200], b"something else entirely, of some length", b"short", b""]
    found = signatures(texts)
    assert found.shape == (7, 16)
    equal = (found == found[0]).mean(axis=1)
    assert equal[1] == 1 and equal[2] >= 0.8 and equal[3] < 0.6 and equal[4] == 0
    alone = np.concatenate([signatures([text]) for text in texts])
    assert (alone == found).all()
    assert signatures([b"short"]).tolist() != signatures([b"shore"]).tolist()


def test_special_tokens_match_as_a_whole_and_short_ones_do_not(tokenizer_json):
    backend = Tokenizer.from_str(tokenizer_json)
    backend.add_special_tokens(["<s>", "[INST]", "["])
    encoder = encoder_for(backend.to_str(), "chatml")
    assert [encoder.special_tokens.occur_in(text) for text in ("x[INST]", "a < b [1]", "", "<|im_end|>")] == [
        True, False, False, True,
    ]  # fmt: skip
