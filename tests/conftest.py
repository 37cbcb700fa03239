"""Fixtures shared by all tests. None needs a network or writes outside temporary folders."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch

gc.disable()  # until all tests are collected: they and their modules stay, and traversing them takes seconds

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; interprets kernels without a GPU

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dft.data.templates.tokenizer import CHATML
from scripts.make_example import tiny_model, train_tokenizer
from tests.forking import Forks, forking
from tests.reliability.spoiling import GOOD, LINE

# fmt: off
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "<start_of_turn>", "<end_of_turn>",
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|return|>", "<|call|>",
]
# fmt: on
"""Special tokens of every template family that the tests imitate."""

CORPUS = """The quick brown fox jumps over the lazy dog. What is two plus two? Two plus two is four.
system user assistant tool messages content. I am an answer, and this is the end of it. Über größere Flüsse
führen Brücken. Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000. {"name": "add", "arguments": {"a": 1, "b": 2}}
"""


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer.json with about 500 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> PreTrainedTokenizerFast:
    """A tokenizer with ChatML template and tokens. Do not change it; load `tokenizer_folder`."""
    backend = Tokenizer.from_str(tokenizer_json)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    loaded.chat_template = CHATML
    return loaded


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which `AutoTokenizer.from_pretrained` loads `tokenizer`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, with `a.jsonl` next to it."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([GOOD["messages"]], vocab_size=300)
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "a.jsonl").write_bytes(LINE * 2)
    return folder / "model"


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Start runs without a launcher as forks of one process, with their own home folder."""
    with forking(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line that tests are skipped because the tokenizers of published models are not there."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any("test_real_tokenizers" in report.nodeid for report in skipped):
        terminalreporter.write_line(
            "skipped: tests on real tokenizers; python scripts/get_tokenizers.py fetches them"
        )
