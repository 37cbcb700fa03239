"""Grade generated answers. math-verify decides which expressions are mathematically equal."""

import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from dft.errors import UserError

GRADERS = ("auto", "boxed", "hash", "number", "exact")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed\s+(?P<bare>[-+.\d\\][^\s$]*)")
r"""A box, with or without braces: some solutions of MATH have `\boxed 5`."""
HASH = re.compile(r"####[ \t]*(\S[^\n]*)")
PLAIN = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?"
NUMBER = re.compile(PLAIN, re.ASCII)
"""A number without commas or with commas between groups of three digits. `3,5,7` and `1,2` are lists."""
ANY_NUMBER = re.compile(rf"(?:(?<!\d)[+-])?{PLAIN.removeprefix('[+-]?')}", re.ASCII)
"""A number anywhere in a text. A sign after a digit is an operator: `7-3` has the numbers 7 and 3."""
OTHER_VALUE = (
    r"(?:hundred|thousand|[mb]illion|dozen|tens|quarter|hal[fv]|third|squared|cubed|and|or|to|times|pi|[a-z])(?![a-z])"
    r"|(?:hundred|thousand|[mb]illion|dozen|quarter|third)s\b|halves"
)
"""Words after a number that change its value. A single letter is treated as a variable."""
WITH_UNIT = re.compile(rf"[*$]*({PLAIN})\.?\**(?:\s+(?!{OTHER_VALUE})[a-z*][^\d=+/^]*)?", re.ASCII | re.I)
"""A number that may be bold, in dollars, or followed by words without another number: `72 clips`."""
MAX_SECONDS = 3
"""CPU time that math-verify may take to parse an answer, and to compare two, in seconds."""
CHECK_INTERVAL = 0.05
"""Seconds between two checks of the CPU time."""

# It would warn about every answer that takes too long and print it in full.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def grade(reference: str, generated: str, grader: str = "auto", has_answer: bool = False) -> bool:
    r"""Return whether a generated answer is correct.

    Args:
        reference: the reference text.
        generated: the generated text.
        grader: "boxed": the last \boxed{} of the text equals that of the reference, mathematically
            (math-verify). "hash": the texts after the last `####` are equal, as in GSM8K; numbers are
            compared as numbers, and may be followed by words. "number": the last numbers of the texts are
            equal, wherever they are. "exact": the texts are equal apart from surrounding white space.
            "auto": chosen to suit the reference; if the reference is only the answer, "hash" if the text
            has `####` and no box, else "boxed".
        has_answer: whether the reference is only the answer.

    Raises:
        UserError: the reference does not contain what the grader looks for.
    """
    if grader == "auto":
        grader = resolve_grader(reference, has_answer)
    if grader == "answer":
        grader = "hash" if last_boxed(generated) is None and last_hash(generated) is not None else "boxed"
    expected = reference_answer(reference, grader, has_answer)
    if grader == "exact":
        return expected == generated.strip()
    answer = FINDERS[grader](generated)
    if answer is None:
        return False
    if grader == "number":
        return same_number(expected, answer)
    if same_number(expected, answer) or same_expression(expected, answer):
        return True
    number = WITH_UNIT.fullmatch(answer) if grader == "hash" else None
    return number is not None and same_number(expected, number[1])


def resolve_grader(reference: str, has_answer: bool) -> str:
    """Return the grader that `auto` selects for a reference.

    "answer" means that the choice depends on whether the generated text has a box or `####`.
    """
    if last_boxed(reference) is not None:
        return "boxed"
    if last_hash(reference) is not None:
        return "hash"
    return "answer" if has_answer else "exact"


def reference_answer(reference: str, grader: str, has_answer: bool) -> str:
    """Return the part of the reference to compare answers with.

    Raises:
        UserError: the reference does not contain what the grader looks for.
    """
    if grader not in FINDERS:
        return reference.strip()
    answer = FINDERS[grader](reference)
    if answer is None and (not has_answer or grader == "number"):
        mark = {"boxed": r"\boxed{}", "hash": "####", "number": "number"}[grader]
        text = reference if len(reference) <= 60 else f"{reference[:57]}..."
        raise UserError(
            f"--grader {grader}: the reference {text!r} has no {mark}; pass another --grader, or an "
            "'answer' in each row"
        )
    return reference.strip() if answer is None else answer


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed \boxed{} or \fbox{}, which may hold braces itself, or None."""
    for match in reversed(list(BOXED.finditer(text))):
        if match["bare"]:
            return match["bare"]
        depth = 1
        for index in range(match.end(), len(text)):
            if text[index - 1] == "\\":
                continue  # an escaped brace is an ordinary character
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                return text[match.end() : index].strip()
    return None


def last_hash(text: str) -> str | None:
    """Return the text between the last `####` and the end of its line, or None."""
    answers = HASH.findall(text)
    return answers[-1].strip() if answers else None


def last_number(text: str) -> str | None:
    """Return the last number of a text, or None. A minus sign may be the typographic one."""
    numbers = ANY_NUMBER.findall(text.replace("\u2212", "-"))
    return numbers[-1] if numbers else None


FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": last_boxed,
    "hash": last_hash,
    "number": last_number,
}
"""Function that extracts the compared part of a text, or returns None, by the name of the grader."""


def same_number(text: str, other: str) -> bool:
    """Return whether both texts are the same plain number: `1,000` is `1000.0`, and `$5` is `5`."""
    number = parse_number(text)
    return number is not None and number == parse_number(other)


def parse_number(text: str) -> Decimal | None:
    """Return the value of a plain number, or None if the text is something else."""
    bare = text.strip().removesuffix(".").strip().lstrip("$")
    if NUMBER.fullmatch(bare) is None:
        return None
    try:
        return Decimal(bare.replace(",", ""))
    except InvalidOperation:  # an exponent of twenty digits
        return None


def same_expression(expected: str, answer: str) -> bool:
    """Return whether math-verify considers two expressions equal. Unparsable text equals only itself."""
    if expected == answer:
        return True
    target, candidate = parse_expression(expected), parse_expression(answer)
    if not (target and candidate):
        return False
    with limit_cpu_time(MAX_SECONDS):
        return verify(list(target), list(candidate), timeout_seconds=None)
    return False


@lru_cache(4096)
def parse_expression(text: str) -> tuple[Any, ...]:
    """Parse an answer with math-verify. Return an empty list if that fails or takes too long."""
    with limit_cpu_time(MAX_SECONDS):
        return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=None))
    return ()


@contextmanager
def limit_cpu_time(seconds: float) -> Iterator[None]:
    """Leave the context early if this thread uses more than `seconds` of CPU time. Main thread only.

    The limits of math-verify itself count elapsed time, so grades would depend on how busy the machine is.
    """
    end = time.thread_time() + seconds

    def check(*_: Any) -> None:
        if time.thread_time() > end:
            raise TimeoutException  # math-verify catches it and returns an empty result

    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, CHECK_INTERVAL, CHECK_INTERVAL)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutException:  # raised outside of math-verify, or just before the timer was stopped
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
