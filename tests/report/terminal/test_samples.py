"""The lines about generated samples are short and contain no characters that move the cursor."""

import pytest

from dft.console import MAX_COLUMNS
from dft.data.preparing.prompts import ReferencePrompt
from dft.report.terminal.samples import columns, prompt_lines, sample_lines, shorten

LONG = "The first words are shown, " + "and many more follow, " * 20 + "before the last ones."


def row(number: int, answer: str, tokens: int = 4, ended: bool = True) -> dict:
    return {"sample": number, "answer": answer, "tokens": tokens, "ended": ended}


def test_the_lines_of_an_evaluation():
    rows = [
        row(1, " four\n"), row(2, "a\tb\x1b[2J\u202e", 7, False), row(3, "", 0), row(4, "not printed", 2),
    ]  # fmt: skip
    assert sample_lines(rows, 20, 600) == [
        "samples step  20/600  3 of 4 answers ended, 3 tokens on average",
        "  1 answer  four",
        "  2 answer  a\\tb\\x1b[2J\\u202e",
        "  3 answer  (empty)",
    ]
    assert sample_lines([row(1, " \n\n")], 5, 1_000_000) == [
        "samples       5/1000000  1 of 1 answers ended, 4 tokens on average",
        "  1 answer  (only white space)",
    ]


def test_prompts_and_references_are_printed_once():
    prompts = [ReferencePrompt("f", n, f"question {n}\nof two lines", "", [1], f"r{n}") for n in range(1, 6)]
    assert prompt_lines(prompts, 128) == [
        "samples     5 prompts are continued at each evaluation, by at most 128 tokens",
        "  1 prompt  question 1\\nof two lines",
        "    answer  r1",
        "  2 prompt  question 2\\nof two lines",
        "    answer  r2",
        "  3 prompt  question 3\\nof two lines",
        "    answer  r3",
    ]
    assert prompt_lines(prompts[:1], 1000)[0] == (
        "samples     1 prompt is continued at each evaluation, by at most 1,000 tokens"
    )


@pytest.mark.parametrize(
    "text", [LONG, "漢字" * 100, "a\n" * 100, "\x00" * 60, "e\u0301" * 200],
    ids=["plain", "wide", "newlines", "control", "combining"],
)  # fmt: skip
def test_long_texts_have_their_start_and_end_and_fit(text):
    (line,) = sample_lines([row(1, text)], 1, 2)[1:]
    assert MAX_COLUMNS - 8 <= columns(line) <= MAX_COLUMNS and " ... " in line and line.isprintable()


def test_what_is_left_out_is_in_the_middle():
    assert shorten(LONG, 60) == "The first words are shown, and many m ... ore the last ones."
    assert shorten("short", 60) == "short"
    assert shorten("\n" * 40, 30) == "\\n" * 8 + " ... " + "\\n" * 4, "no escape is cut in two"
