"""The lines that a run prints about the samples it generates."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from dft.console import MAX_COLUMNS
from dft.data.preparing.prompts import ReferencePrompt

SHOWN = 3
"""Number of samples that are printed; samples.jsonl and the report have all of them."""
GAP = " ... "
"""Mark for what is left out of a text."""


def prompt_lines(prompts: Sequence[ReferencePrompt], max_tokens: int) -> list[str]:
    """Return the lines that are printed before training: the first prompts and their references.

    Args:
        prompts: all prompts.
        max_tokens: maximum number of tokens of an answer.
    """
    unit = "prompt is" if len(prompts) == 1 else "prompts are"
    lines = [
        f"samples     {len(prompts)} {unit} continued at each evaluation, by at most {max_tokens:,} tokens"
    ]
    for number, prompt in enumerate(prompts[:SHOWN], 1):
        lines += [_line(f"  {number} prompt  ", prompt.question), _line("    answer  ", prompt.reference)]
    return lines


def sample_lines(rows: Sequence[Mapping[str, Any]], step: int, max_steps: int) -> list[str]:
    """Return the lines that are printed after an evaluation.

    Args:
        rows: the rows of the evaluation, see `dft.report.samples_file`.
        step: optimizer step of the evaluation.
        max_steps: number of optimizer steps of the run.
    """
    word = "" if max_steps >= 1_000_000 else "step "
    mean = sum(row["tokens"] for row in rows) / len(rows)
    lines = [
        f"samples {word}{step:>{len(str(max_steps))}}/{max_steps}  {sum(row['ended'] for row in rows)} of "
        f"{len(rows)} answers ended, {mean:.0f} tokens on average"
    ]
    return lines + [_line(f"  {row['sample']} answer  ", row["answer"]) for row in rows[:SHOWN]]


def _line(start: str, text: str) -> str:
    if not text.strip():
        return start + ("(only white space)" if text else "(empty)")
    return start + shorten(text.strip(), MAX_COLUMNS - len(start))


def shorten(text: str, width: int) -> str:
    """Return a text as one line, with its middle left out if it is wider than `width` columns.

    Characters that would move the cursor or be invisible are escaped.
    """
    letters = [visible(letter) for letter in text]
    if sum(map(columns, letters)) <= width:
        return "".join(letters)
    end = (width - len(GAP)) // 3
    start = width - len(GAP) - end
    first, last = fitting(letters, start), fitting(letters[::-1], end)[::-1]
    return "".join(first).rstrip() + GAP + "".join(last).lstrip()


def visible(letter: str) -> str:
    """Return a character, or its escape if it is not printable."""
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


def fitting(letters: Sequence[str], width: int) -> Sequence[str]:
    """Return as many of the first letters, or escapes, as fit in `width` columns."""
    used = 0
    for index, letter in enumerate(letters):
        used += columns(letter)
        if used > width:
            return letters[:index]
    return letters


def columns(text: str) -> int:
    """Return the number of columns of a terminal that a printable text takes."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) != 0 for letter in text)
