"""The example of the reliability tests."""

import json
from pathlib import Path

import pytest

from tests.examples import Example, make_example


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder with `reliability`, in addition to its own marks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("reliability")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """An example whose model has dropout, so that the random states matter."""
    example = make_example(tmp_path_factory.mktemp("example"))
    config = json.loads((example.model / "config.json").read_text())
    (example.model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return example
