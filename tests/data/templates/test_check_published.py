"""The tool that checks folders of published chat templates."""

import json
import time
from pathlib import Path

import pytest

from tests.data.templates import check_published
from tests.data.templates.chat_templates import CHATML_LINES
from tests.data.templates.check_published import (
    OutOfTime,
    Pair,
    Published,
    check_template,
    plain_vocabulary,
    read_folder,
    table,
    time_limit,
)
from tests.data.templates.corpus import CONVERSATIONS

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
ROWS = {name: CONVERSATIONS[name] for name in ("question", "system")}


@pytest.fixture(scope="module")
def vocabulary(tokenizer_json: str) -> str:
    return plain_vocabulary(tokenizer_json)


def test_pairs_are_exact_or_refused_with_the_reason(vocabulary):
    template = Published("own", NO_SYSTEM + CHATML_LINES, family="ours")
    assert check_template(template, vocabulary, "<|im_end|>", ROWS) == [
        Pair("own", "ours", "question", "exact", "", False),
        Pair(
            "own",
            "ours",
            "system",
            "refused",
            "the chat template refuses the conversation: no system turns",
            False,
        ),
    ]


def test_pair_with_other_sequences_than_the_judge_expects_is_wrong(vocabulary, monkeypatch):
    def encode_without_end(encoder, row):
        ((ids, labels),) = encode(encoder, row)
        end = max(index for index, label in enumerate(labels) if label >= 0)
        return [(ids, [-100 if index == end else label for index, label in enumerate(labels)])]

    encode = check_published.encode
    monkeypatch.setattr(check_published, "encode", encode_without_end)
    (pair,) = check_template(
        Published("own", CHATML_LINES), vocabulary, "<|im_end|>", {"question": ROWS["question"]}
    )
    assert (pair.outcome, pair.reason) == (
        "wrong",
        "messages[1]: end-of-turn token not supervised (<|im_end|>)",
    )


def test_refusal_is_avoidable_if_the_judge_has_exact_sequences(vocabulary, monkeypatch):
    def refuse(encoder, row):
        raise check_published.BadLine("messages[1]: too long", "too long")

    monkeypatch.setattr(check_published, "encode", refuse)
    pairs = check_template(Published("own", CHATML_LINES), vocabulary, "<|im_end|>", ROWS)
    assert [(pair.outcome, pair.avoidable) for pair in pairs] == [("refused", True)] * 2


def test_tokenizer_has_the_tokens_of_the_index_and_of_the_source_and_no_others(vocabulary):
    template = Published(
        "own", "{{ '<|turn|><think>' }}", bos_token="<s>", eos_token="</s>", special_tokens=["[E]"]
    )
    tokenizer = template.tokenizer(vocabulary, "<|im_end|>")
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert added == {"<s>": True, "</s>": True, "[E]": True, "<|turn|>": True, "<think>": False}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert "<|im_end|>" not in tokenizer.tokenize("<|im_end|>")


def test_tokenizer_can_be_cut_to_its_first_merges(tokenizer_json):
    tokenizer = Published("own", "").tokenizer(plain_vocabulary(tokenizer_json, 10), "</s>")
    assert len(tokenizer) == 256 + 10 + 1
    assert tokenizer.decode(tokenizer("Grüße, 日本").input_ids) == "Grüße, 日本"


def test_folder_with_and_without_an_index(tmp_path: Path):
    (tmp_path / "a-1.jinja").write_text("A")
    (tmp_path / "b-1.jinja").write_text("B")
    assert read_folder(tmp_path, "b") == [Published("b-1", "B")]
    index = [{"name": "a-1", "family": "A", "eos_token": "</s>", "source": "ignored"}]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert read_folder(tmp_path, "") == [
        Published("a-1", "A", family="A", eos_token="</s>"),
        Published("b-1", "B"),
    ]


def test_template_that_takes_too_long_is_wrong_from_there_on(vocabulary, monkeypatch):
    def encode(encoder, row):
        time.sleep(10)

    monkeypatch.setattr(check_published, "encode", encode)
    monkeypatch.setattr(check_published, "SECONDS", 0.5)
    pairs = check_template(Published("own", CHATML_LINES), vocabulary, "<|im_end|>", ROWS)
    assert [(pair.conversation, pair.outcome, pair.reason) for pair in pairs] == [
        ("question", "wrong", "no result within 0.5 seconds"),
        ("system", "wrong", "no result within 0.5 seconds"),
    ]


def test_time_limit_ends_with_its_context():
    with pytest.raises(OutOfTime), time_limit(0.01):
        time.sleep(1)
    with time_limit(0.01):
        pass
    time.sleep(0.02)


def test_table_has_a_line_for_each_family():
    pairs = [
        Pair("a1", "A", "question", "exact", "", False),
        Pair(
            "a2",
            "A",
            "question",
            "refused",
            "messages[3]: the chat template ends with <|x|>; put it",
            True,
        ),
        Pair("b", "B", "question", "wrong", "messages[1]: wrong context (x)", False),
    ]
    assert table(pairs).splitlines()[2:] == [
        "| A | 2 | 1 | 1 | 1 | 0 | ends with <\\|x\\|> (1) |",
        "| B | 1 | 0 | 0 | 0 | 1 |  |",
    ]
