"""One example and one folder of caches for every run that the tests start."""

import pytest

from tests.examples import Example, make_example


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example(tmp_path_factory.mktemp("example"))
