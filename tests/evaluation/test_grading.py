"""Grades of generated answers."""

import signal
import time

import pytest

from dft.errors import UserError
from dft.evaluation.grading import grade, last_boxed, last_hash, limit_cpu_time, same_number

BOXED = [
    (r"so \boxed{42}", r"I think \boxed{42}.", True),
    (r"so \boxed{42}", "the answer is 42", False),
    (r"so \boxed{42}", r"\boxed{41} no, \boxed{42}", True),
    (r"so \boxed{42}", r"\boxed{42} no, \boxed{41}", False),
    (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", True),
    (r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac12}", True),
    (r"\boxed{\frac{1}{2}}", r"\boxed{2/4}", True),
    (r"\boxed{\sqrt{\frac{8}{2}}}", r"\boxed{2}", True),
    (r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", True),
    (r"\boxed{x^2+2x+1}", r"\boxed{(x+2)^2}", False),
    (r"\boxed{(1, 2)}", r"\boxed{(2, 1)}", False),
    (r"\boxed{(1, 2)}", r"\boxed{(1,2)}", True),
    (r"\boxed{\{1, 2\}}", r"\boxed{\{2,1\}}", True),
    (r"\boxed{1{,}000}", r"\boxed{1000}", True),
    (r"\boxed{50\%}", r"\boxed{50}", True),
    (r"\boxed{\text{Monday}}", r"\boxed{\text{Monday}}", True),
    (r"\boxed{7}", r"\boxed{7", False),  # cut off
    (r"\boxed{7}", r"\boxed{}", False),
    (r"\boxed{7}", r"\boxed{\notalatex{{{}", False),
]
HASH = [
    ("2 + 3 = 5\n#### 5", "it is\n#### 5", True),
    ("#### 5", "#### 5.0", True),
    ("#### 1,234", "#### 1234", True),
    ("#### 1234", "#### $1,234.", True),
    ("#### 5", "5", False),
    ("#### 5", "#### 4\n#### 5", True),
    ("#### 5", "#### 5\n#### 4", False),
    ("#### 1/2", "#### 0.5", True),
    ("#### -3", "#### 3", False),
    ("#### 5", "####", False),
    ("#### 72", "#### 72 clips", True),
    ("#### 72", "#### $72 dollars.", True),
    ("#### 72", "#### **72**", True),
    ("#### 1,072", "#### **$1072** in all", True),
    ("#### 72", "#### 7 clips", False),
    ("#### 7", "#### 7 clips and 2 films", False),
    ("#### 7", "#### 7 = x", False),
    ("#### 7", "#### 7 million", False),
    ("#### 7", "#### 7 Times", False),
    ("#### 7", "#### 7 K", False),
    ("#### 7", "#### 7 x", False),
    ("#### 7", "#### 7 and a half", False),
    ("#### 7", "#### 7 quarters of it", False),
    ("#### 7", "#### 7 squared", False),
    ("#### 7", "#### 7 toys", True),
    ("#### 7", "#### 7 androids", True),
    ("#### 7", "#### 7/2", False),
    ("#### 7", "#### 7,5", False),
]


@pytest.mark.parametrize(("reference", "generated", "right"), BOXED)
def test_boxed_answers_are_compared_as_mathematics(reference, generated, right):
    assert grade(reference, generated, "boxed") is right
    assert grade(reference, generated) is right


@pytest.mark.parametrize(("reference", "generated", "right"), HASH)
def test_answers_after_hashes_are_compared(reference, generated, right):
    assert grade(reference, generated, "hash") is right
    assert grade(reference, generated) is right


@pytest.mark.parametrize(
    ("reference", "generated", "right"),
    [
        ("8", "4 * 2 = 8", True),
        ("8", "The answer is 8.", True),
        ("8", "8 or 9", False),
        ("-3", "6 - 9 = -3", True),
        ("-3", "6-9 is \u22123", True),
        ("3", "10-3", True),
        ("-3", "10-3", False),
        ("2", "either 1,2", True),
        ("12", "either 1,2", False),
        ("1000", "**$1,000.00** in all", True),
        ("so 6 * 7 = 42", "42", True),
        ("8", "eight", False),
        ("8", "", False),
    ],
)
def test_last_numbers_are_compared(reference, generated, right):
    assert grade(reference, generated, "number") is right


def test_texts_are_compared_exactly():
    assert grade("tree horse", " tree horse\n") and not grade("tree horse", "Tree horse")
    assert not grade("4", "4.0", "exact")


def test_answer_column_is_compared_with_the_box_or_the_hashes():
    assert grade("42", r"\boxed{42}", has_answer=True) and grade("42", "#### 42", has_answer=True)
    assert not grade("42", "42", has_answer=True)
    assert grade("42", "42", "exact", has_answer=True)
    assert grade(r"\frac{3}{4}", r"\boxed{0.75}", has_answer=True)
    assert not grade("42", r"\boxed{41} #### 42", has_answer=True)


def test_reference_without_box_or_hashes_is_an_error():
    with pytest.raises(UserError, match=r"--grader boxed: the reference 'four' has no \\boxed\{\}; pass"):
        grade("four", r"\boxed{4}", "boxed")
    with pytest.raises(UserError, match="--grader hash: the reference .* has no ####"):
        grade("x" * 100, "#### 4", "hash")
    with pytest.raises(UserError, match="--grader number: the reference 'four' has no number"):
        grade("four", "4", "number", has_answer=True)


def test_a_slow_answer_is_wrong_and_not_printed(caplog, monkeypatch):
    monkeypatch.setattr("dft.evaluation.grading.MAX_SECONDS", 0.5)
    assert not grade(r"\boxed{3}", r"\boxed{9^{9^{9^{9^9}}}}", "boxed")
    assert not grade(r"\boxed{3}", r"\boxed{9^{9^{9^{9^9}}}}")
    assert not grade("3", r"\boxed{8^{9^{9^{9^9}}}}", has_answer=True)
    assert not caplog.records


def test_the_time_limit_counts_only_cpu_time_of_the_thread(monkeypatch):
    monkeypatch.setattr("dft.evaluation.grading.CHECK_INTERVAL", 0.01)
    with limit_cpu_time(0.2):
        time.sleep(0.4)  # as on a busy machine
        finished = True
    assert finished
    with limit_cpu_time(0.05):
        while True:
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_last_closed_box_and_last_hashes_are_extracted():
    assert last_boxed(r"a \boxed{f(\{x\}) = {1}} b") == r"f(\{x\}) = {1}"
    assert last_boxed(r"\fbox{1} \boxed {2}") == "2" and last_boxed(r"\boxed{2} \fbox{1}") == "1"
    assert last_boxed(r"\fboxed{1}") is None
    assert last_boxed(r"so $\boxed 5$.") == "5" and last_boxed(r"\boxed \frac{1}{2} is") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{4}, in the \boxed notation") == "4"
    assert last_boxed(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed("none") is None and last_hash("none") is None
    assert last_hash("#### a b \nrest") == "a b"


@pytest.mark.parametrize(
    ("number", "other"),
    [("1e3", "1,000"), ("1,234", "1234"), ("27.0", "27"), ("$1,234.", "1234"), ("-.5", "-0.50"), ("+7", "7")],
)
def test_numbers_are_compared_by_value(number, other):
    assert same_number(number, other) and same_number(other, number)


@pytest.mark.parametrize("text", ["one", "nan", "inf", "e5", "", ".", "$", "1e99999999999999999999", "٣"])
def test_other_texts_are_not_numbers(text):
    assert not same_number(text, text)


@pytest.mark.parametrize(
    ("reference", "generated"),
    [
        ("52_8", "528"), ("2516_8", "25168"), ("3,5,7", "357"), ("1,2", "12"), ("12", "1,2"), ("5", "_5"),
        ("12,345", "1,2345"),
    ],
)  # fmt: skip
def test_commas_and_underscores_are_not_ignored(reference, generated):
    """A list, or a number in another base, does not equal the number with the same digits."""
    assert not grade(reference, rf"\boxed{{{generated}}}", has_answer=True)
    assert not grade(f"#### {reference}", f"#### {generated}")
