"""The description of a run: its arguments and the commit of its code."""

import json
import subprocess

from dft.arguments.parser import parse_arguments
from dft.report.run_record import git_commit, given_arguments, resolved_arguments
from tests.arguments.command import words


def test_arguments_are_complete_and_exclude_secrets(tmp_path):
    (tmp_path / "token.yaml").write_text("hub_token: hf_secret")
    config = str(tmp_path / "token.yaml")
    arguments = parse_arguments(words(tmp_path, "--dft_alpha", "0.7", "--config", config))
    resolved, explicit = resolved_arguments(arguments), given_arguments(arguments)
    assert explicit["dft_alpha"] == 0.7 and "learning_rate" not in explicit
    assert resolved["learning_rate"] == 5e-5 and resolved["max_length"] == 2048 and resolved["report"] is True
    assert "hf_secret" not in json.dumps([resolved, explicit])


def test_git_commit_marks_changed_files(tmp_path):
    def git(*more: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
        command = ["git", "-C", str(tmp_path), *identity, *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == commit + "+"
    inside = tmp_path / "environment"  # with an installed package
    inside.mkdir()
    assert git_commit(inside) is None
