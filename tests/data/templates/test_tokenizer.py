"""Loading of the tokenizer, its chat template and the stop tokens, with notes and errors."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dft.data.templates import tokenizer as tokenizer_module
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.tokenizer import (
    CHATML,
    CHATML_TOKENS,
    load_tokenizer,
    stop_token_ids,
    tokens_added_to,
)
from dft.errors import UserError
from tests.data.templates.chat_templates import CHATML_LINES, Supervised, encode, expected, with_template


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', "[1]", "{"])
def test_invalid_generation_config_is_named_in_the_error(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="generation_config.json"):
        stop_token_ids(str(tmp_path))


def test_minus_one_is_not_a_stop_token(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, -1]}')
    assert stop_token_ids(str(tmp_path)) == [3]


def save(folder: Path, tokenizer_json: str, template: str | None = None, **options: str) -> str:
    with_template(tokenizer_json, template, **options).save_pretrained(folder)
    return str(folder)


def test_tokenizer_without_template_gets_chatml_with_its_tokens(tokenizer_json, tmp_path):
    plain = json.loads(tokenizer_json)
    plain["added_tokens"] = [token for token in plain["added_tokens"] if "im_" not in token["content"]]
    for token in ("<|im_start|>", "<|im_end|>"):
        del plain["model"]["vocab"][token]
    folder = save(tmp_path / "base", json.dumps(plain), eos_token="<|endoftext|>")
    tokenizer, notes = load_tokenizer(folder)
    assert notes == [
        "chat template: the tokenizer has none; plain ChatML is used, and saved with the model",
        "added to the vocabulary: <|im_start|> <|im_end|>",
        "end of turn: <|im_end|> (was <|endoftext|>), so that generation stops there",
    ]
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert tokenizer.eos_token_id == end
    ((ids, labels),) = encode(ChatEncoder(tokenizer), ("user", "q"), ("assistant", "i"))
    assert (ids, labels) == expected(
        tokenizer, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", Supervised("i<|im_end|>"), "\n"
    )
    assert ids.count(start) == ids.count(end) == 2 and labels.count(end) == 1

    tokenizer.save_pretrained(tmp_path / "trained")
    again, notes = load_tokenizer(str(tmp_path / "trained"))
    assert notes == [] and again.eos_token_id == end and again.chat_template == tokenizer.chat_template
    assert encode(ChatEncoder(again), ("user", "q"), ("assistant", "i")) == [(ids, labels)]


def save_with_unused_ids(folder: Path, tokenizer_json: str) -> int:
    """Save a tokenizer without template whose two special tokens have ids above unused ones, as o200k.

    Returns:
        The first unused id.
    """
    plain = json.loads(tokenizer_json)
    kept = ("<|endoftext|>", "<|end|>")
    special = {token["content"] for token in plain["added_tokens"]}
    vocabulary = [token for token in plain["model"]["vocab"] if token not in special]
    ids = {token: index for index, token in enumerate(vocabulary)}
    special_ids = {kept[0]: len(ids) + 1, kept[1]: len(ids) + 20}
    plain["model"]["vocab"] = {**ids, **special_ids}
    plain["added_tokens"] = [
        {**token, "id": special_ids[token["content"]]}
        for token in plain["added_tokens"]
        if token["content"] in kept
    ]
    save(folder, json.dumps(plain), eos_token="<|endoftext|>")
    return len(ids)


def test_added_tokens_have_the_ids_of_the_saved_tokenizer_if_the_vocabulary_has_unused_ids(
    tokenizer_json, tmp_path
):
    unused = save_with_unused_ids(tmp_path / "base", tokenizer_json)
    tokenizer, notes = load_tokenizer(str(tmp_path / "base"))
    assert notes == [
        "chat template: the tokenizer has none; plain ChatML is used, and saved with the model",
        "added to the vocabulary: <|im_start|> <|im_end|>",
        f"ids of the added tokens: {unused + 2} {unused + 3}, as in the saved tokenizer, whose vocabulary "
        f"has unused ids (before saving: {unused + 21} {unused + 22})",
        "end of turn: <|im_end|> (was <|endoftext|>), so that generation stops there",
    ]
    assert tokenizer.convert_tokens_to_ids(list(CHATML_TOKENS)) == [unused + 2, unused + 3]
    assert tokenizer.eos_token_id == unused + 3
    assert tokenizer.name_or_path == str(tmp_path / "base")
    ((ids, labels),) = encode(ChatEncoder(tokenizer), ("user", "q"), ("assistant", "i"))
    assert labels[-3:-1] == tokenizer.encode("i<|im_end|>")

    tokenizer.save_pretrained(tmp_path / "trained")
    again, notes = load_tokenizer(str(tmp_path / "trained"))
    assert notes == [] and again.get_vocab() == tokenizer.get_vocab()
    assert encode(ChatEncoder(again), ("user", "q"), ("assistant", "i")) == [(ids, labels)]


def test_tokenizer_with_other_ids_after_every_save_is_an_error(tokenizer_json, tmp_path, monkeypatch):
    save_with_unused_ids(tmp_path / "base", tokenizer_json)
    monkeypatch.setattr("dft.data.templates.tokenizer._same_ids", lambda *_: False)
    message = (
        f"--model_name_or_path {tmp_path}/base: with <|im_start|> <|im_end|> added, the tokenizer gives "
        "other ids each time it is saved and loaded; pass a --chat_template whose tokens the vocabulary "
        "contains"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_tokenizer(str(tmp_path / "base"))


def test_tokenizer_that_cannot_be_loaded_after_saving_is_an_error(tokenizer_json, tmp_path, monkeypatch):
    save_with_unused_ids(tmp_path / "base", tokenizer_json)
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "save_pretrained",
        lambda _self, folder: Path(folder, "tokenizer.json").touch(),
    )
    message = "with <|im_start|> <|im_end|> added, the tokenizer cannot be saved and loaded ("
    with pytest.raises(UserError, match=re.escape(message)):
        load_tokenizer(str(tmp_path / "base"))


def test_complete_tokenizer_is_not_changed(tokenizer_folder):
    tokenizer, notes = load_tokenizer(str(tokenizer_folder))
    assert notes == []
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tokenizer_folder).chat_template == CHATML


def test_template_file_replaces_the_template(tokenizer_folder, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content + 'ü<|end|>' }}{% endfor %}", encoding="utf-8")
    tokenizer, notes = load_tokenizer(str(tokenizer_folder), chat_template=str(file))
    assert notes == [f"chat template: {file}"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == "qü<|end|>"


def test_special_tokens_missing_in_the_vocabulary_are_noted(tokenizer_folder, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ '<|turn|>' + m.content + '<|end|>' }}{% endfor %}")
    _, notes = load_tokenizer(str(tokenizer_folder), chat_template=str(file))
    assert notes[1].startswith("chat template: it may write <|turn|>, which the vocabulary does not contain,")


def test_template_that_is_not_valid_jinja_raises_with_its_line(tokenizer_json, tokenizer_folder, tmp_path):
    file = tmp_path / "bad.jinja"
    file.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(UserError, match=f"^--chat_template {file}:2: not valid Jinja: unexpected '}}'$"):
        load_tokenizer(str(tokenizer_folder), chat_template=str(file))
    folder = save(tmp_path / "own", tokenizer_json, CHATML_LINES + "\n{% if %}", eos_token="<|im_end|>")
    with pytest.raises(UserError, match=f"{folder}: chat template, line 4: not valid Jinja"):
        load_tokenizer(folder)


def test_template_file_that_cannot_be_read_raises(tokenizer_folder, tmp_path):
    empty, binary = tmp_path / "empty.jinja", tmp_path / "binary.jinja"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    cases = {
        tmp_path / "none.jinja": "no such file",
        tmp_path: r"cannot be read \(Is a directory\)",
        empty: "the file is empty; expected a Jinja chat template",
        binary: r"not valid UTF-8 \(invalid start byte\)",
    }
    for file, reason in cases.items():
        with pytest.raises(UserError, match=f"^--chat_template {file}: {reason}$"):
            load_tokenizer(str(tokenizer_folder), chat_template=str(file))


def test_folder_without_a_valid_tokenizer_raises(tmp_path):
    with pytest.raises(UserError, match=f"^--model_name_or_path {tmp_path}/none: no such folder$"):
        load_tokenizer(f"{tmp_path}/none")
    with pytest.raises(UserError, match="the folder holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    for content in ("{", "{}", ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="no tokenizer could be loaded, reading tokenizer.json"):
            load_tokenizer(str(tmp_path))


def test_built_in_template_renders_tool_calls(tokenizer_folder):
    tokenizer, _ = load_tokenizer(str(tokenizer_folder))
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "ü": [True, None]}}},
        {"name": "now", "arguments": "{}"},
    ]
    messages = [{"role": "assistant", "content": "Hm", "tool_calls": calls}, {"role": "tool", "content": "3"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>assistant\nHm\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "ü": [true, null]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("eos", "ids"), [("7", [7]), ("[7, 8]", [7, 8]), ("null", [])])
def test_stop_tokens_are_read_from_the_generation_config(tmp_path, eos, ids):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    assert stop_token_ids(str(tmp_path)) == ids


def test_generation_config_may_be_missing_but_not_invalid(tmp_path):
    assert stop_token_ids(str(tmp_path)) == []
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="--model_name_or_path .*not a valid JSON file"):
        stop_token_ids(str(tmp_path))


def test_named_tokens_are_added_and_the_saved_tokenizer_has_them(tokenizer_folder, tmp_path):
    before = load_tokenizer(str(tokenizer_folder))[0]
    tokenizer, notes = load_tokenizer(str(tokenizer_folder), add_tokens=["<think>", "<a b>"])
    assert notes == ["added to the vocabulary: <think> <a b>"]
    ids = [len(before), len(before) + 1]
    assert tokenizer.convert_tokens_to_ids(["<think>", "<a b>"]) == ids
    assert tokenizer.encode("a<think>b<a b>", add_special_tokens=False)[1::2] == ids
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))[0].get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path), add_tokens=["<new>", "<think>"])
    assert str(caught.value) == (
        f"--add_tokens <think>: the vocabulary has this token already, with the id {ids[0]}; remove it from "
        "the flag"
    )


def test_named_tokens_may_be_those_of_chatml(tokenizer_json, tmp_path):
    save_with_unused_ids(tmp_path, tokenizer_json)
    tokenizer, _ = load_tokenizer(str(tmp_path), add_tokens=["<think>", "<|im_end|>"])
    assert tokenizer.chat_template == CHATML and tokenizer.eos_token == "<|im_end|>"
    again = load_tokenizer(str(tmp_path), add_tokens=["<think>", "<|im_end|>"])[0]
    assert tokenizer.get_vocab() == again.get_vocab()
    ids = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>", "<|im_start|>"])
    assert len(set(ids)) == 3 and None not in ids
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))[0].get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_without_added_tokens_is_loaded_once(tokenizer_json, tmp_path, monkeypatch):
    """Loading takes up to two seconds on every rank."""
    folder = save(tmp_path, tokenizer_json, "{% for m in messages %}{{ m.content }}{% endfor %}")
    loads, load = [], tokenizer_module._load
    monkeypatch.setattr(tokenizer_module, "_load", lambda *names: loads.append(names) or load(*names))
    plain, _ = load_tokenizer(folder)
    assert tokens_added_to(plain, folder) == [] and len(loads) == 1
    larger, _ = load_tokenizer(folder, add_tokens=["<|b|>", "<|a|>"])
    assert tokens_added_to(larger, folder, add_tokens=["<|b|>", "<|a|>"]) == ["<|b|>", "<|a|>"]
