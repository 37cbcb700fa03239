"""docs/flags.md is generated from the dataclasses of flags."""

import re

from dft.arguments.parser import own_flags
from scripts.make_flags_page import INHERITED_PAGE, PAGE, flags_page, inherited_page


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run python scripts/make_flags_page.py"


def test_the_page_of_transformers_flags_is_current():
    page = INHERITED_PAGE.read_text(encoding="utf-8")
    assert page == inherited_page(), "run python scripts/make_flags_page.py"


def test_every_flag_of_this_project_has_one_row():
    rows = re.findall(r"^\| `--(\w+)`", flags_page(), re.MULTILINE)
    assert len(rows) == len(set(rows)) and own_flags() <= set(rows)
    assert "metric_for_best_model" in rows and "learning_rate" not in rows


def test_every_row_has_four_cells():
    rows = [line for line in flags_page().splitlines() if line.startswith("| `--")]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 and "||" not in row for row in rows)


def test_the_page_does_not_depend_on_the_environment(monkeypatch, tmp_path):
    page = flags_page()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert flags_page() == page
