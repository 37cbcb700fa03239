"""Print the pinned requirements that this Python environment does not meet.

    python scripts/check_requirements.py requirements.txt [requirements-dev.txt ...]

Checks the packages that are actually installed, so that running the setup again is fast and correct. Needs
only the standard library, because it runs before anything is installed.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;#]+)")


def unmet(line: str) -> bool:
    """Return whether a `name==version` line is not met. A local version such as 2.13.0+cpu meets 2.13.0."""
    pin = PIN.match(line)
    if pin is None:
        raise SystemExit(f"error: every requirement is pinned as name==version, got: {line}")
    try:
        return version(pin["name"]).split("+")[0] != pin["version"]
    except PackageNotFoundError:
        return True


def requirements(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


if __name__ == "__main__":
    for file in sys.argv[1:]:
        for requirement in filter(unmet, requirements(Path(file))):
            print(requirement)
