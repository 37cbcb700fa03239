"""Generated samples of a run: each prompt with its reference and the answers of several evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_PROMPTS = 20
"""Number of prompts that the page shows; samples.jsonl has all."""
MAX_ANSWERS = 12
"""Number of answers to a prompt that the page shows: the first, the last, and others evenly between them."""
MAX_TEXT = 6000
"""Number of characters of a text that the page shows."""


@dataclass(frozen=True)
class AnswerView:
    """An answer of the model.

    Attributes:
        step: optimizer step of the evaluation.
        text: the answer as shown.
        tokens: its number of tokens.
        ended: whether the model ended it.
        is_reference: whether it equals the reference.
    """

    step: int
    text: str
    tokens: int
    ended: bool
    is_reference: bool


@dataclass(frozen=True)
class SampleView:
    """A prompt with its answers, the newest first.

    Attributes:
        origin: file and line of the conversation.
        prompt: the prompt as shown.
        reference: the reference as shown.
        answers: some of the answers.
        total: number of all answers.
    """

    origin: str
    prompt: str
    reference: str
    answers: list[AnswerView]
    total: int


def sample_views(rows: Sequence[Mapping[str, Any]]) -> list[SampleView]:
    """Return the first prompts with their answers.

    Args:
        rows: the rows of samples.jsonl, see `dft.report.samples_file`.
    """
    prompts: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:  # a resumed run may use other data, whose prompts have the same numbers
        prompts.setdefault((row["sample"], row["prompt"], row["reference"]), []).append(row)
    return [_view(members) for members in list(prompts.values())[:MAX_PROMPTS]]


def _view(rows: list[Mapping[str, Any]]) -> SampleView:
    shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_ANSWERS)).round().astype(int))
    first = rows[0]
    answers = [
        AnswerView(
            row["step"],
            show_text(row["answer"]),
            row["tokens"],
            row["ended"],
            row["answer"].strip() == row["reference"].strip(),
        )
        for row in (rows[index] for index in reversed(shown))
    ]
    prompt, reference = show_text(first["prompt"], from_end=True), show_text(first["reference"])
    return SampleView(f"{first['file']}:{first['line']}", prompt, reference, answers, len(rows))


def show_text(text: str, from_end: bool = False) -> str:
    """Return a text with control characters escaped and, if it is long, one end left out."""
    if len(text) > MAX_TEXT:
        text = f"[...]{text[-MAX_TEXT:]}" if from_end else f"{text[:MAX_TEXT]}[...]"
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )
