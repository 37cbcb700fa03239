"""A model and two conversations that a run would work with, were nothing spoiled."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.make_example import tiny_model, train_tokenizer
from tests.examples import Example, make_example
from tests.forking import Forks, forking
from tests.reliability.spoiling import GOOD, LINE


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, with `a.jsonl` beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([GOOD["messages"]], vocab_size=300)
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "a.jsonl").write_bytes(LINE * 2)
    return folder / "model"


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
