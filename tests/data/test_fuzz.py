"""Every line of a file is trained on or reported exactly once, regardless of the file's contents."""

import base64
import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError

FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
OPTIONS = PrepareOptions(max_length=48, on_bad_data="skip")

text = st.text(max_size=12)
word = st.sampled_from(
    ["", " ", "a", "<|im_end|>", "<|im_start|>assistant\n", "\u2028", "\x00", "🙂", "é" * 9]
)
content = st.one_of(text, word, st.none(), st.integers(), st.lists(text, max_size=2))
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), max_size=2)
role = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "human", "", "assistant "])
extras = st.sampled_from(
    [{}, {"train": False}, {"weight": 0}, {"weight": 0.5}, {"name": "n"}, {"tool_calls": []}, {"x": None},
     {"tool_calls": [{"name": "f", "arguments": "{}"}]}, {"tool_calls": [1]}, {"reasoning_content": "r"}]
)  # fmt: skip
message = st.builds(
    lambda role, content, extra: {"role": role, "content": content, **extra},
    role, st.one_of(content, parts), extras,
)  # fmt: skip
good = st.builds(
    lambda question, answer, tail: {
        "messages": [
            {"role": "user", "content": f"q{question}"},
            {"role": "assistant", "content": f"a{answer}"},
            *tail,
        ]
    },
    text, text, st.lists(message, max_size=2),
)  # fmt: skip
sharegpt = st.builds(
    lambda question, answer: {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    },
    text, content,
)  # fmt: skip
pair = st.builds(lambda q, a: {"prompt": q, "completion": a}, content, content)
row = st.one_of(good, good, sharegpt, pair, st.dictionaries(text, content, max_size=2), content)
line = row.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


JUNK = [b"", b'"', b"{", b"}", b"]", b",", b"\\", b"\x00", b"\xff", b"NaN", b"\r", b"\\ud800"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a line, most often valid, with up to three short ranges removed, inserted or replaced."""
    raw = bytearray(draw(line))
    for _ in range(draw(st.integers(0, 3)) * draw(st.integers(0, 1))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 4))] = draw(st.sampled_from(JUNK))
    return bytes(raw).replace(b"\n", b" ")


Outcome = tuple[PreparedData, list[dict], set[int]]
"""The prepared data, the rows of rejected.jsonl, and the line numbers that are trained on."""


def prepared(encoder: ChatEncoder, name: str, raw: bytes) -> Outcome | None:
    """Prepare one file; return None if none of its lines can be used."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(raw)
        try:
            data = prepare([str(file)], [], encoder, OPTIONS, cache_dir=Path(folder) / "cache", workers=0)
        except UserError as error:
            assert "none of the" in str(error) or "the file is empty" in str(error)
            return None
        data.write_report(Path(folder))
        rejected = Path(folder) / "rejected.jsonl"
        rows = [json.loads(text) for text in rejected.read_bytes().splitlines()] if rejected.exists() else []
        dataset = data.datasets["train"]
        return data, rows, {dataset.origins(row)[0][1] for row in range(len(dataset))}


def original_text(row: dict) -> bytes:
    return row["text"].encode() if "text" in row else base64.b64decode(row["base64"])


def check(outcome: Outcome | None, expected: dict[int, bytes]) -> None:
    """Check that every record, by line number, is trained on, dropped for its length, or rejected."""
    if outcome is None:
        return
    data, rejected, trained = outcome
    report = data.report
    lines = Counter(row["line"] for row in rejected)
    assert report["conversations_read"] == len(expected)
    assert report["rejected"] == len(rejected) == sum(report["rejected_by_reason"].values())
    assert set(lines.values()) <= {1} and not set(lines) & trained
    assert set(lines) | trained <= set(expected)
    dropped = report["dropped_without_supervised_tokens"]
    assert len(lines) + len(trained) + dropped == len(expected)
    for row in rejected:
        assert row["reason"] and original_text(row) == expected[row["line"]]


@FUZZ
@given(
    lines=st.lists(mutated(), min_size=1, max_size=30),
    end=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_every_line_of_a_file_is_trained_on_or_reported(encoder, lines, end, mark):
    # The first line is valid, because a file that begins with "[" would be read as an array.
    lines = [b'{"prompt": "q", "completion": "a"}', *lines]
    raw = mark + end.join(lines)
    records = {number: text for number, text in enumerate(raw.split(b"\n"), start=1) if text.strip()}
    check(prepared(encoder, "a.jsonl", raw), records)
    if len(lines) < 4:
        check(prepared(encoder, "a.jsonl.gz", gzip.compress(raw)), records)


@FUZZ
@given(rows=st.lists(line, min_size=1, max_size=20), gap=st.sampled_from([b",", b" , ", b",\n", b"\n,\n\n"]))
def test_every_element_of_an_array_is_trained_on_or_reported(encoder, rows, gap):
    raw = b"[" + gap.join(rows) + b"]"
    outcome = prepared(encoder, "a.json", raw)
    if outcome is None:
        return
    data, rejected, _ = outcome
    report = data.report
    assert report["conversations_read"] == len(rows) and report["rejected"] == len(rejected)
    assert (
        report["rejected"] + report["dropped_without_supervised_tokens"] + report["train"]["conversations"]
    ) == len(rows)
    remaining = Counter(rows) - Counter(map(original_text, rejected))
    assert remaining.total() == len(rows) - len(rejected), "a rejected row is not in the file"
