"""Warnings about data that can be trained on, but probably should not be as it is."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dft.data.preparing.encoded_sequences import EncodedSequences
from dft.data.preparing.evaluation_sets import EVAL
from dft.data.preparing.near_duplicates import has_near_twin
from dft.data.preparing.traits import SCRIPTS, Flag

MINIMUM = 20
"""Number of conversations below which shares mean nothing."""
EXAMPLES = 2
MAX_LISTED_SCRIPTS = 3
MIN_CUT_TOKENS, MIN_CUT_CHARACTERS = 64, 200
"""Length below which answers of the same length are no sign of a limit."""
MIN_REPEATED_CHARACTERS = 20
"""Length below which repeated answers are ordinary, such as the answers to yes/no questions."""


FLAG_TEXTS = {
    Flag.MARKERS: "answers contain special tokens as text",
    Flag.EMPTY_REASONING: "answers have empty reasoning, others do not",
    Flag.NO_QUESTION: "conversations have no user turn, others do",
    Flag.REFUSAL: "answers are refusals or speak of an AI model",
    Flag.OTHER_SCRIPT: "answers are in another script than their question",
}
"""Text of the warning about properties of single conversations."""


class Warned(NamedTuple):
    """Something to check.

    Attributes:
        text: what it is.
        split: "train", or the evaluation set.
        members: index of the first sequence of each conversation that has it.
    """

    text: str
    split: str
    members: np.ndarray


def find_warnings(splits: dict[str, EncodedSequences]) -> list[dict[str, Any]]:
    """Return what is unusual about the conversations of the splits, the most frequent first.

    Args:
        splits: "train" and the evaluation sets.

    Returns:
        For each warning its text, split, number of conversations, share of the split and examples, which are
        pairs of a file number and a line.
    """
    distinct = {name: _first_sequences(encoded) for name, encoded in splits.items()}
    train = distinct["train"]
    warned = [*_flag_warnings(train), *_length_warnings(train), *_repeated_answers(train)]
    for split, held_out in distinct.items():
        if split != "train":
            warned += _nearly_equal(train, held_out, split)
    warned.sort(key=lambda item: -len(item.members))
    return [_entry(item, distinct[item.split]) for item in warned]


def _first_sequences(encoded: EncodedSequences) -> EncodedSequences:
    """Return the first sequence of each conversation."""
    _, first = np.unique(encoded.conversations, return_index=True)
    return encoded.take(first)


def _entry(item: Warned, encoded: EncodedSequences) -> dict[str, Any]:
    return {
        "text": item.text,
        "split": item.split,
        "conversations": len(item.members),
        "share": len(item.members) / len(encoded),
        "examples": [
            {"file": int(encoded.sources[index]), "line": int(encoded.lines[index])}
            for index in item.members[:EXAMPLES]
        ],
    }


def _flag_warnings(train: EncodedSequences) -> Iterator[Warned]:
    """Yield the warnings about properties of single conversations."""
    flags, total = train.traits["flags"], len(train)

    def having(flag: Flag) -> np.ndarray:
        return np.flatnonzero(flags & flag)

    if len(members := having(Flag.MARKERS)):
        yield Warned(FLAG_TEXTS[Flag.MARKERS], "train", members)
    if 0 < len(members := having(Flag.EMPTY_REASONING)) < total:
        yield Warned(FLAG_TEXTS[Flag.EMPTY_REASONING], "train", members)
    if 0 < len(members := having(Flag.NO_QUESTION)) < total:
        yield Warned(FLAG_TEXTS[Flag.NO_QUESTION], "train", members)
    if len(members := having(Flag.REFUSAL)) >= max(1, total / 200):
        yield Warned(FLAG_TEXTS[Flag.REFUSAL], "train", members)
    if total < MINIMUM:
        return
    if total / 10 <= len(members := having(Flag.SYSTEM_PROMPT)) <= total * 9 / 10:
        yield Warned("conversations have a system prompt, others have none", "train", members)
    if len(members := having(Flag.OTHER_SCRIPT)) >= max(2, total / 100):
        yield Warned(FLAG_TEXTS[Flag.OTHER_SCRIPT], "train", members)
    scripts = train.traits["script"]
    counts = np.bincount(scripts, minlength=len(SCRIPTS))
    counts[0] = 0
    rare = [script for script in np.flatnonzero(counts) if max(2, total / 1000) <= counts[script] < total / 5]
    if rare:
        listed = sorted(rare, key=lambda script: -counts[script])[:MAX_LISTED_SCRIPTS]
        names = ", ".join(f"{[*SCRIPTS][script]} {counts[script]:,}" for script in listed)
        names += ", ..." if len(rare) > len(listed) else ""
        yield Warned(
            f"answers are in a rare script ({names})", "train", np.flatnonzero(np.isin(scripts, rare))
        )


def _length_warnings(train: EncodedSequences) -> Iterator[Warned]:
    """Yield a warning if many answers have the greatest length of all: they were generated with a limit."""
    for name, unit, minimum in (
        ("answer_tokens", "tokens", MIN_CUT_TOKENS),
        ("answer_characters", "characters", MIN_CUT_CHARACTERS),
    ):
        lengths = train.traits[name]
        longest = lengths.max()
        members = np.flatnonzero(lengths == longest)
        distinct = len(np.unique(train.traits["answer"][members]))
        if longest >= minimum and distinct >= max(3, len(train) / 200) and len(members) < len(train):
            yield Warned(
                f"answers have exactly {longest:,} {unit}, the maximum: probably cut off",
                "train",
                members,
            )
            return


def _repeated_answers(train: EncodedSequences) -> Iterator[Warned]:
    answers, number, counts = np.unique(train.traits["answer"], return_inverse=True, return_counts=True)
    is_long = train.traits["answer_characters"] >= MIN_REPEATED_CHARACTERS
    is_frequent = counts >= max(5, len(train) / 100)
    members = np.flatnonzero(is_frequent[number] & is_long)
    if len(members):
        kinds = len(np.unique(answers[number[members]]))
        what = "have the same answer" if kinds == 1 else f"share {kinds:,} answers"
        yield Warned(f"conversations {what}", "train", members)


def _nearly_equal(train: EncodedSequences, held_out: EncodedSequences, split: str) -> Iterator[Warned]:
    """Yield a warning about evaluation conversations that are nearly equal to one for training."""
    members = np.flatnonzero(has_near_twin(held_out.traits["signature"], train.traits["signature"]))
    if len(members):
        of_set = "" if split == EVAL else f" of the set {split.removeprefix(f'{EVAL}_')!r}"
        text = f"evaluation conversations{of_set} nearly equal one for training"
        yield Warned(text, split, members)
