"""The example depends on the seed only, its files are disjoint, and its tokenizer renders ChatML."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.reading.reader import read_batches
from dft.data.reading.sources import resolve_sources
from dft.data.templates.encoder import ChatEncoder
from scripts.make_example import read_conversations, tiny_model, train_tokenizer, write_conversations


def test_equal_seeds_give_equal_files(tmp_path):
    first = write_conversations(tmp_path / "a", count=60, seed=3)
    again = write_conversations(tmp_path / "b", count=60, seed=3)
    other = write_conversations(tmp_path / "c", count=60, seed=4)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[0].read_bytes() != other[0].read_bytes()
    tokenizers = [train_tokenizer(read_conversations(path)) for path in (first[0], again[0])]
    assert tokenizers[0].backend_tokenizer.to_str() == tokenizers[1].backend_tokenizer.to_str()
    weights = [tiny_model(tokenizers[0], seed).lm_head.weight for seed in (0, 0, 1)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_the_files_are_disjoint_and_have_all_roles(tmp_path):
    train, evaluation = write_conversations(tmp_path, count=400)
    lines = [path.read_text().splitlines() for path in (train, evaluation)]
    assert [len(group) for group in lines] == [360, 40] and not set(lines[0]) & set(lines[1])
    conversations = read_conversations(train)
    roles = {turn["role"] for messages in conversations for turn in messages}
    assert roles == {"system", "user", "assistant", "tool"}
    assert any(sum(turn["role"] == "assistant" for turn in messages) > 2 for messages in conversations)
    for batch in read_batches(*resolve_sources([str(train)], "--data_files")):
        for record in batch.records:
            parse_conversation(record.text)  # raises for rows that training rejects


def test_fewer_than_two_conversations_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="at least 2, .* got 1"):
        write_conversations(tmp_path, count=1)


def test_contents_may_hold_unicode_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    content = "one\u2028two\x85three"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": content}]}, ensure_ascii=False) + "\n"
    )
    assert read_conversations(path) == [[{"role": "user", "content": content}]]


def test_the_saved_model_loads_and_only_answers_are_supervised(tmp_path):
    train, _ = write_conversations(tmp_path / "data", count=60)
    trained = train_tokenizer(read_conversations(train))
    tiny_model(trained).save_pretrained(tmp_path / "model")
    trained.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    ((example,),) = ChatEncoder(tokenizer).encode([Conversation(turns, (False, True))])
    assert tokenizer.decode(example.input_ids) == (
        "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert tokenizer.decode(example.labels[example.labels != -100]) == "4<|im_end|>"
