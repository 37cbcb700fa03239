"""Arithmetic problems are written as chat, as many as were asked for."""

import json
import sys

import pytest

from dft.errors import UserError
from scripts import make_problems

pytest.importorskip("reasoning_gym", reason="pip install -r requirements-real.txt")


def write(monkeypatch, folder, count):
    monkeypatch.setattr(sys, "argv", ["make_problems.py", str(folder), f"--train={count}"])
    monkeypatch.setattr(make_problems, "report_user_errors", lambda: None)
    make_problems.main()


def questions(file):
    return [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("count", [1, 7, 400])
def test_number_of_conversations_is_exact_and_none_is_held_out(tmp_path, monkeypatch, capsys, count):
    write(monkeypatch, tmp_path, count)
    training, evaluation = questions(tmp_path / "train.jsonl"), questions(tmp_path / "eval.jsonl")
    assert (len(training), len(evaluation)) == (count, 100)
    assert not set(training) & set(evaluation)
    assert f"wrote {count} conversations" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, -4])
def test_number_of_conversations_below_1_is_an_error(tmp_path, monkeypatch, count):
    with pytest.raises(UserError, match=f"--train {count}: pass a number of at least 1"):
        write(monkeypatch, tmp_path, count)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is not a folder; remove it or name another"):
        write(monkeypatch, file, 2)
    assert file.read_text() == "mine"
