"""What whole runs are made on, and the process they are forked from."""

import json
from collections.abc import Iterator

import pytest

from tests.examples import Example, make_example
from tests.forking import Forks, forking


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
