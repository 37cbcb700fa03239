"""Training sequences as text, with the reason why a sequence begins anew."""

import json
from pathlib import Path

import pytest

from dft.data.batches.dataset import Sequences
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import prepare
from dft.data.templates.encoder import ChatEncoder
from dft.report.terminal.data import show_sequences
from tests.data.templates.chat_templates import CHATML_LINES, FORGETS_REASONING, encoder_of

END = "<|im_end|>"


def conversation(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[number % 2], "content": content} for number, content in enumerate(contents)
        ]
    }


def prepared(folder: Path, encoder: ChatEncoder, text: str, name: str = "a.jsonl") -> Sequences:
    (folder / name).write_text(text)
    options = PrepareOptions(max_length=200)
    data = prepare([str(folder / name)], [], encoder, options, cache_dir=folder / "c", workers=1)
    dataset = data.datasets["train"]
    dataset.files = [name]
    return dataset


def lines_of(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def counts(dataset: Sequences, row: int) -> str:
    labels = dataset[row]["labels"].tolist()
    return f"{len(labels)} tokens, {sum(label != -100 for label in labels)} supervised (marked >>)"


@pytest.mark.parametrize("color", [False, True])
def test_shown_sequences_mark_exactly_the_supervised_text(tokenizer, tmp_path, color):
    rows = [conversation("q", "one\n\nßtwo\x1b"), conversation("r", "a", "s", "b"), conversation("t", "a")]
    dataset = prepared(tmp_path, ChatEncoder(tokenizer), lines_of(*rows))
    shown = show_sequences(dataset, tokenizer, color=color)
    green, plain = ("\033[32m", "\033[0m") if color else ("", "")
    assert shown.splitlines() == [
        f"a.jsonl:1, sequence 1 of 1 of this conversation: {counts(dataset, 0)}",
        "prompt",
        "   | <|im_start|>user\\n",
        "   | q<|im_end|>\\n",
        "   | <|im_start|>assistant\\n",
        "completion 1",
        f"{green}>> | one\\n{plain}",
        f"{green}>> | \\n{plain}",
        f"{green}>> | ßtwo\\x1b<|im_end|>{plain}",
        "after the last completion",
        "   | \\n",
        f"a.jsonl:2, sequence 1 of 1 of this conversation: {counts(dataset, 1)}",
        "prompt",
        "   | <|im_start|>user\\n",
        "   | r<|im_end|>\\n",
        "   | <|im_start|>assistant\\n",
        "completion 1",
        f"{green}>> | a<|im_end|>{plain}",
        "prompt, continued",
        "   | \\n",
        "   | <|im_start|>user\\n",
        "   | s<|im_end|>\\n",
        "   | <|im_start|>assistant\\n",
        "completion 2",
        f"{green}>> | b<|im_end|>{plain}",
        "after the last completion",
        "   | \\n",
    ], "only two sequences are shown by default"


def test_sequence_of_an_unrolled_conversation_says_why_it_begins_anew(tokenizer_json, tmp_path):
    encoder = encoder_of(tokenizer_json, FORGETS_REASONING, eos_token=END)
    text = lines_of(conversation("q", "<think>hm</think>one", "r", "two"), conversation("s", "a"))
    dataset = prepared(tmp_path, encoder, text)
    assert show_sequences(dataset, encoder.tokenizer, range(3)).splitlines() == [
        f"a.jsonl:1, sequence 1 of 2 of this conversation: {counts(dataset, 0)}",
        "prompt",
        "   | <|im_start|>user\\n",
        "   | q<|im_end|>\\n",
        "   | <|im_start|>assistant\\n",
        "completion 1",
        ">> | <think>\\n",
        ">> | hm\\n",
        ">> | </think>\\n",
        ">> | \\n",
        ">> | one<|im_end|>",
        "after the last completion",
        "   | \\n",
        f"a.jsonl:1, sequence 2 of 2 of this conversation: {counts(dataset, 1)}",
        r"starts a new sequence because the chat template renders "
        r"'<|im_start|>assistant\n<think>\nhm\n</think>\n\none<|im_end|>\n' as "
        r"'<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nr<|im_end' "
        r"once the conversation continues",
        "prompt",
        "   | <|im_start|>user\\n",
        "   | q<|im_end|>\\n",
        "   | <|im_start|>assistant\\n",
        "   | one<|im_end|>\\n",
        "   | <|im_start|>user\\n",
        "   | r<|im_end|>\\n",
        "   | <|im_start|>assistant\\n",
        "completion 1",
        ">> | two<|im_end|>",
        "after the last completion",
        "   | \\n",
        f"a.jsonl:2, sequence 1 of 1 of this conversation: {counts(dataset, 2)}",
        *show_sequences(dataset, encoder.tokenizer, [2]).splitlines()[1:],
    ]


def test_conversations_on_one_line_of_a_json_array_are_not_parts_of_one_another(tokenizer, tmp_path):
    rows = [conversation("q", "a"), conversation("r", "b")]
    dataset = prepared(tmp_path, ChatEncoder(tokenizer), json.dumps(rows), "a.json")
    shown = show_sequences(dataset, tokenizer).splitlines()
    assert [line for line in shown if line.startswith("a.json")] == [
        f"a.json:1, sequence 1 of 1 of this conversation: {counts(dataset, row)}" for row in (0, 1)
    ]


def test_turn_that_is_tokenized_separately_says_so(tokenizer_json, tmp_path):
    """The newline of the header and the first newline of the answer would form one token."""
    changed = json.loads(tokenizer_json)
    changed["model"]["vocab"]["ĊĊ"] = len(changed["model"]["vocab"])
    changed["model"]["merges"].append(["Ċ", "Ċ"])
    encoder = encoder_of(json.dumps(changed), CHATML_LINES, eos_token=END)
    dataset = prepared(tmp_path, encoder, lines_of(conversation("q", "a", "r", "\n\nb")))
    shown = show_sequences(dataset, encoder.tokenizer).splitlines()
    start = shown.index(f"a.jsonl:1, sequence 2 of 2 of this conversation: {counts(dataset, 1)}")
    assert shown[start + 1] == (
        "starts a new sequence because a token would straddle a prompt and its completion, so they are "
        "tokenized separately, as at inference"
    )
