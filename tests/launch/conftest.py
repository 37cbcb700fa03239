"""The example of the tests that start training runs."""

import pytest

from tests.examples import Example, make_example


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example(tmp_path_factory.mktemp("example"))
