"""The oldest Python version that is promised is one that the pinned requirements can be installed with."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
REQUIRES_PYTHON = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
OLDEST = REQUIRES_PYTHON.removeprefix(">=")
LINES = (ROOT / "requirements.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LINES if line and not line.startswith("#")]


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_pinned_requirements_support_the_oldest_python(pin):
    supported = metadata.metadata(pin.name).get("Requires-Python")
    assert f"{OLDEST}.0" in SpecifierSet(supported or ""), f"{pin} needs Python {supported}"


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/installation.md", "scripts/setup.sh"])
def test_pages_and_set_up_name_the_oldest_python(page):
    assert set(re.findall(r"Python (3\.\d+) (?:or newer|或更新)", (ROOT / page).read_text())) == {OLDEST}


def test_set_up_accepts_no_older_python():
    assert f"sys.version_info < ({OLDEST.replace('.', ', ')})" in (ROOT / "scripts/setup.sh").read_text()
