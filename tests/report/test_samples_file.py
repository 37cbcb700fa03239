"""The file of samples: rows that stay and rows that are removed when a run starts or resumes."""

import json

import pytest

from dft.report.samples_file import SAMPLES, append_samples, continue_samples, read_samples


def row(step: int, sample: int = 1, **changes) -> dict:
    return {
        "step": step, "sample": sample, "file": "a.jsonl", "line": 1, "question": "q", "prompt": "p q",
        "reference": "r", "answer": f"answer of {step}", "tokens": 3, "ended": True, **changes,
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    append_samples(tmp_path / SAMPLES, [row(0), row(0, 2)])
    append_samples(tmp_path / SAMPLES, [row(20), row(20, 2)])
    append_samples(tmp_path / SAMPLES, [row(40)])
    return tmp_path / SAMPLES


def test_rows_are_appended_and_read(file):
    assert read_samples(file) == ([row(0), row(0, 2), row(20), row(20, 2), row(40)], 0)
    assert [json.loads(line) for line in file.read_text().splitlines()] == read_samples(file)[0]


@pytest.mark.parametrize(("step", "steps"), [(10, [0, 0]), (20, [0, 0, 20, 20]), (40, [0, 0, 20, 20, 40])])
def test_a_resumed_run_removes_the_rows_of_later_steps(file, step, steps):
    assert continue_samples(file, step) == 0
    assert [row["step"] for row in read_samples(file)[0]] == steps


def test_a_new_run_removes_the_file(file):
    continue_samples(file, 0)
    assert not file.exists() and read_samples(file) == ([], 0)
    continue_samples(file, 0)
    assert continue_samples(file, 20) == 0 and not file.exists()


def test_damaged_lines_are_counted_and_removed(file):
    good = file.read_bytes()
    broken = [b'{"step": 40, "sam', b"7", b"\xff\xfe", json.dumps({**row(20), "tokens": "3"}).encode()]
    file.write_bytes(broken[1] + b"\n" + good + b"\n".join(broken))
    assert read_samples(file) == ([row(0), row(0, 2), row(20), row(20, 2), row(40)], 5)
    assert continue_samples(file, 40) == 5 and file.read_bytes() == good


def test_texts_of_any_kind_survive(tmp_path):
    texts = ["\u2028\x85\x1e line", "\ud800", "emoji 🙂\r\n", "\x00"]
    rows = [row(1, number, answer=text) for number, text in enumerate(texts)]
    append_samples(tmp_path / SAMPLES, rows)
    assert read_samples(tmp_path / SAMPLES) == (rows, 0)
