"""What whole runs are made on, and the process they are forked from."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples import Example, make_example
from tests.forking import Forks, forking


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that is tested here is reliability; what takes long is slow besides."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("reliability")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """What whole runs are made on: a model with dropout, so that random numbers matter."""
    made = make_example(tmp_path_factory.mktemp("example"))
    config = json.loads((made.model / "config.json").read_text())
    (made.model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return made


@pytest.fixture(scope="session")
def forks(example: Example) -> Iterator[Forks]:
    with forking(example.folder) as made:
        yield made
