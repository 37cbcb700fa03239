"""One example and one folder of caches for every run that the tests start."""

from collections.abc import Iterator

import pytest

from tests.examples import Example, make_example
from tests.forking import Forks, forking


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def forks(example: Example) -> Iterator[Forks]:
    """For runs that need no launcher."""
    with forking(example.folder) as made:
        yield made
