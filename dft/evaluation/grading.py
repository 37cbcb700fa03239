"""Whether a generated answer is right. What is equal in mathematics is for math-verify to say."""

import logging
import re
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from dft.errors import UserError

GRADERS = ("auto", "boxed", "hash", "exact")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed\s+(?P<bare>[-+.\d\\][^\s$]*)")
"""`\boxed 5`, as in some of MATH's solutions, has no braces."""
HASH = re.compile(r"####[ \t]*(\S[^\n]*)")
PLAIN = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?"
NUMBER = re.compile(PLAIN, re.ASCII)
"""With commas between groups of three digits or none: `3,5,7` and `1,2` are lists."""
OTHER_VALUE = (
    r"(?:hundred|thousand|[mb]illion|dozen|tens|quarter|hal[fv]|third|squared|cubed|and|or|to|times|pi|[a-z])(?![a-z])"
    r"|(?:hundred|thousand|[mb]illion|dozen|quarter|third)s\b|halves"
)
"""Words behind a number that make it another one; a single letter may be a variable."""
WITH_UNIT = re.compile(rf"[*$]*({PLAIN})\.?\**(?:\s+(?!{OTHER_VALUE})[a-z*][^\d=+/^]*)?", re.ASCII | re.I)
"""A number in bold, in dollars, or in front of words without another number: `72 clips`."""
SECONDS = 3
"""For math-verify to read an answer, and to compare two."""

# It warns of each answer that takes too long, and prints all of it.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def grade(reference: str, generated: str, grader: str = "auto", has_answer: bool = False) -> bool:
    r"""Whether an answer is right.

    boxed: the last \boxed{} of the text is equal to that of the reference, in mathematics (math-verify).
    hash: what follows the last `####`, as in GSM8K; numbers are compared as numbers, also where words stand
    behind them. exact: the texts are equal but for white space around them. auto: as the reference has it;
    where it is nothing but an answer, `####` if the text has that and no box, else boxed.

    Args:
        has_answer: whether the reference is nothing but the answer.

    Raises:
        UserError: the reference has not what the grader looks for.
    """
    if grader == "auto":
        grader = suited(reference, has_answer)
    if grader == "answer":
        grader = "hash" if last_boxed(generated) is None and last_hash(generated) is not None else "boxed"
    wanted = wanted_answer(reference, grader, has_answer)
    if grader == "exact":
        return wanted == generated.strip()
    found = last_boxed(generated) if grader == "boxed" else last_hash(generated)
    if found is None:
        return False
    if same_number(wanted, found) or same_expression(wanted, found):
        return True
    number = WITH_UNIT.fullmatch(found) if grader == "hash" else None
    return number is not None and same_number(wanted, number[1])


def suited(reference: str, has_answer: bool) -> str:
    """The grader that `auto` stands for; `answer` is what the generated text has of a box and `####`."""
    if last_boxed(reference) is not None:
        return "boxed"
    if last_hash(reference) is not None:
        return "hash"
    return "answer" if has_answer else "exact"


def wanted_answer(reference: str, grader: str, has_answer: bool) -> str:
    """What of the reference an answer is held against.

    Raises:
        UserError: it has not what the grader looks for.
    """
    if grader not in ("boxed", "hash"):
        return reference.strip()
    wanted = last_boxed(reference) if grader == "boxed" else last_hash(reference)
    if wanted is None and not has_answer:
        mark = r"\boxed{}" if grader == "boxed" else "####"
        raise UserError(
            f"--grader {grader}: the reference {shortened(reference)!r} has no {mark}; give another "
            "--grader, or an 'answer' in each row"
        )
    return reference.strip() if wanted is None else wanted


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} or \fbox{} holds, braces within it included; None where none is closed."""
    for match in reversed(list(BOXED.finditer(text))):
        if match["bare"]:
            return match["bare"]
        depth = 1
        for index in range(match.end(), len(text)):
            if text[index - 1] == "\\":
                continue  # an escaped brace is a character
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                return text[match.end() : index].strip()
    return None


def last_hash(text: str) -> str | None:
    """What stands behind the last `####` of its line."""
    found = HASH.findall(text)
    return found[-1].strip() if found else None


def same_number(one: str, other: str) -> bool:
    """Whether both are plain numbers, and the same one: `1,000` is `1000.0`, and `$5` is `5`."""
    numbers = [plain_number(text) for text in (one, other)]
    return None not in numbers and numbers[0] == numbers[1]


def plain_number(text: str) -> Decimal | None:
    bare = text.strip().removesuffix(".").strip().lstrip("$")
    if NUMBER.fullmatch(bare) is None:
        return None
    try:
        return Decimal(bare.replace(",", ""))
    except InvalidOperation:  # an exponent of twenty digits
        return None


def same_expression(wanted: str, found: str) -> bool:
    """Whether math-verify holds both for equal; what it cannot read is equal to nothing but the same text."""
    if wanted == found:
        return True
    gold, answer = expression(wanted), expression(found)
    return bool(gold and answer) and verify(list(gold), list(answer), timeout_seconds=SECONDS)


@lru_cache(4096)
def expression(text: str) -> tuple[Any, ...]:
    """An answer as math-verify reads it."""
    return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=SECONDS))


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
