"""Fixtures shared by the tests that start training runs: one example and one cache folder."""

from collections.abc import Iterator

import pytest

from tests.examples import Example, make_example
from tests.forking import Forks, forking


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Start runs without a launcher as forks of one process, with their own home folder."""
    with forking(tmp_path_factory.mktemp("forks")) as forks:
        yield forks
