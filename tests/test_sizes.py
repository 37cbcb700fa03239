"""Limits of the length of files and functions, so that each stays readable as a whole."""

import ast
from pathlib import Path

import pytest

from tests.launching import ROOT

MAX_FILE, MAX_FUNCTION = 350, 60
"""Lines."""
FILES = sorted([*(ROOT / "dft").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "train_dft.py"])


def functions(path: Path) -> dict[str, int]:
    """Return the number of lines of each function of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {
        node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kinds)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    assert {name: lines for name, lines in functions(path).items() if lines > MAX_FUNCTION} == {}


@pytest.mark.parametrize(("name", "function"), [("train_dft.py", "main"), ("dft/fine_tune.py", "fine_tune")])
def test_the_entry_script_and_a_run_are_lists_of_steps(name, function):
    path = ROOT / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150 and functions(path)[function] <= 50
