"""Fixtures of the data tests."""

from collections.abc import Callable

import pytest

from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from tests.data.rows import Row, write


@pytest.fixture(scope="session")
def encoder(tokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture
def prepared(encoder, tmp_path) -> Callable[..., PreparedData]:
    """Function that writes rows to train.jsonl (and eval.jsonl) and prepares them."""

    def run(rows: list[Row], eval_rows: list[Row] | None = None, *, workers=1, **options) -> PreparedData:
        files = [write(tmp_path / "train.jsonl", rows)]
        eval_files = [] if eval_rows is None else [write(tmp_path / "eval.jsonl", eval_rows)]
        settings = PrepareOptions(**{"max_length": 64, **options})
        return prepare(files, eval_files, encoder, settings, cache_dir=tmp_path / "cache", workers=workers)

    return run
