"""Ids that stand for text outside the vocabulary."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from dft.data.templates.text_tokenizer import TextTokenizer


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (BPE({"a": 0, "?": 1}, [], unk_token="?"), {1}),
        (BPE({"a": 0, "?": 1}, []), set()),
        (BPE({"a": 0}, [], unk_token="?"), set()),
        (WordLevel({"a": 0, "?": 1}, unk_token="?"), {1}),
        (WordPiece({"a": 0, "?": 1}, unk_token="?"), {1}),
        (Unigram([("a", 0.0), ("?", 0.0)], unk_id=1), {1}),
        (Unigram([("a", 0.0)]), set()),
    ],
)
def test_ids_of_unknown_text_are_those_of_the_model(model, expected):
    backend = Tokenizer(model)
    assert TextTokenizer(backend, frozenset()).unknown_ids == expected
    saved = json.loads(backend.to_str())["model"]
    token = saved.get("unk_token")
    of_json = {saved.get("unk_id"), backend.token_to_id(token) if token else None} - {None}
    assert of_json == expected
