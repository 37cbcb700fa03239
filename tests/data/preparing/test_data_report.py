"""Truncated, mixed and packed data: sequences equal those of single lines, and every line is counted."""

import random
from pathlib import Path

import numpy as np
import pytest

from dft.data.conversations.conversation import parse_conversation
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import prepare
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from tests.data.rows import Row, numbered, write

LIMIT = 90
WORDS = ["two", "plus", "12", "<|im_end|>", "\n", "é", "🙂", "assistant", "  x"]


def random_row(generator: random.Random) -> Row:
    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, 20))) + "."

    messages = []
    for _ in range(generator.randint(1, 4)):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        messages[-1]["train"] = generator.random() < 0.8
    messages[-1]["train"] = True
    return {"messages": messages}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    generator = random.Random(5)
    folder = tmp_path_factory.mktemp("rows")
    return [
        write(folder / f"{number}.jsonl", [random_row(generator) for _ in range(60)]) for number in range(3)
    ]


def encode_alone(encoder: ChatEncoder, file: str, line: int, truncation: str) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of one line of a file, encoded and truncated separately."""
    ((example,),) = encoder.encode([parse_conversation(Path(file).read_bytes().split(b"\n")[line - 1])])
    part = slice(-LIMIT, None) if truncation == "left" else slice(LIMIT)
    return example.input_ids[part].tolist(), [-100, *example.labels[part].tolist()[1:]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
def test_every_sequence_equals_that_of_its_line_and_every_line_is_counted(
    encoder, files, tmp_path, truncation, packing
):
    mixed = {"data_weights": (1, 0.5, 2), "validation_split_percentage": 10}
    options = PrepareOptions(LIMIT, truncation=truncation, packing=packing, **mixed)
    data = prepare(files, [], encoder, options, cache_dir=tmp_path, workers=1)
    used = set()
    for dataset in data.datasets.values():
        for number, row in enumerate(dataset):
            ends = np.cumsum([0, *row.get("seq_lengths", [len(row["input_ids"])])])
            for (file, line), start, end in zip(dataset.origins(number), ends, ends[1:], strict=False):
                actual = row["input_ids"][start:end].tolist(), row["labels"][start:end].tolist()
                assert actual == encode_alone(encoder, files[file], line, truncation)
                used.add((file, line))
    report = data.report
    unused = ("dropped_without_supervised_tokens", "dropped_for_their_length", "conversations_not_drawn")
    assert len(used) + sum(report[name] for name in unused) == report["conversations_read"] == 180
    assert all(report[name] for name in unused[2:]) and len(used) > 20


def test_a_report_does_not_replace_or_remove_a_data_file(encoder, tmp_path):
    file = tmp_path / "rejected.jsonl"
    write(file, numbered(3))
    before = file.read_bytes()
    data = prepare([str(file)], [], encoder, PrepareOptions(), cache_dir=tmp_path / "cache", workers=0)
    with pytest.raises(UserError, match="rejected.jsonl is a data file, which would be lost; name another"):
        data.write_report(tmp_path)
    assert file.read_bytes() == before and not (tmp_path / "data_report.json").exists()
