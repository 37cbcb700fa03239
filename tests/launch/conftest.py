"""One example and one folder of caches for every run that the tests start."""

from collections.abc import Iterator

import pytest

from tests.examples import Example, make_example
from tests.forking import Forks, forking


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """For runs that need no launcher; with a home of their own."""
    with forking(tmp_path_factory.mktemp("forks")) as made:
        yield made
