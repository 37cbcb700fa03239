"""Every file is read or rejected with one error; scripts/bench/fuzz.py does the same guided by coverage."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dft.arguments.config_file import expand_config
from dft.arguments.deepspeed_file import check_parts, read_deepspeed
from dft.arguments.parser import Parser
from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import RowLeftOut
from dft.data.reading.data_file import DataFile, split_suffix
from dft.data.reading.reader import read_batches
from dft.data.sandbox.limits import LimitExceeded
from dft.data.templates.renderer import ConversationRenderer
from dft.data.templates.template import ChatTemplate
from dft.data.templates.tokenizer import CHATML, check_template
from dft.errors import UserError
from tests.data.templates.chat_templates import (
    CHANNELS,
    DEFAULT_SYSTEM,
    FORGETS_REASONING,
    MERGES_SYSTEM,
    NEXT_HEADER_ENDS,
    OPENS_THINKING,
    TAGGED,
)
from tests.launching import ROOT
from tests.reliability.spoiling import LINE

EXAMPLES = 300
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
SECONDS = 60
"""Seconds for each target of the coverage-guided fuzzer."""

junk = st.sampled_from(
    [b"", b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\0", b"\xff", b"\n", b"\xef\xbb\xbf"]
)
words = st.text(max_size=8)
plain = st.none() | st.booleans() | st.integers() | st.floats() | words
value = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Strategy: the bytes with up to five places removed or replaced, or truncated."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 9))] = draw(junk | st.binary(max_size=4))
    return bytes(raw[: draw(st.integers(0, len(raw)))]) if draw(st.booleans()) else bytes(raw)


# ---- lines ----


@FUZZ
@given(
    raw=st.one_of(st.binary(max_size=200), spoiled(LINE * 3), spoiled(b"[" + LINE + b"," + LINE + b"]")),
    suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"]),
)
def test_arbitrary_bytes_are_records_or_faults(tmp_path_factory, raw, suffix):
    file = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    file.write_bytes(raw)
    records = [
        record
        for batch in read_batches(DataFile(str(file), file, *split_suffix(str(file)), 0))
        for record in batch.records
    ]
    assert records, "a file without a conversation must be reported"
    for record in records:
        if record.flaw is None:
            try:
                parse_conversation(record.text)
            except BadLine as error:
                assert str(error) and error.kind
            except RowLeftOut as condition:
                assert str(condition) == "weight 0"
        else:
            assert record.flaw.reason and record.flaw.kind


# ---- templates ----

REAL = (
    CHATML, TAGGED, CHANNELS, DEFAULT_SYSTEM, FORGETS_REASONING, MERGES_SYSTEM, NEXT_HEADER_ENDS,
    OPENS_THINKING,
)  # fmt: skip
TOKENS = re.compile(r"\{[%{#].*?[%}#]\}|[^{]+|\{", re.DOTALL)
OPERATORS = ["+", "-", "/", "//", "%", "~", "==", "<", "in", "and"]
EXPRESSIONS = st.recursive(
    st.sampled_from(
        [
            "message",
            "messages",
            "m.content",
            "message.role",
            "'a'",
            "1",
            "[]",
            "x",
            "tools",
            "bos_token",
            "loop.index",
        ]
    ),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds(
            "{}.{}".format, inner, st.sampled_from(["content", "role", "split", "items()", "__class__"])
        ),
        st.builds(
            "({} | {})".format, inner, st.sampled_from(["tojson", "trim", "length", "list", "first", "join"])
        ),
    ),
    max_leaves=4,
)
PIECES = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% if {} %}}a{{% endif %}}".format, EXPRESSIONS),
    st.builds("{{% for message in {} %}}b{{% endfor %}}".format, EXPRESSIONS),
    st.sampled_from(
        ["{% endif %}", "{% else %}", "{% set x = messages %}", "{% break %}", "{{ raise_exception(1) }}"]
    ),
    words,
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Strategy: a known template with some of its tags and texts removed, moved or replaced."""
    parts = TOKENS.findall(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(parts) - 1)) if parts else 0
        new = draw(st.one_of(PIECES, st.just(""), st.sampled_from(parts) if parts else words))
        parts[at : at + draw(st.integers(0, 2))] = [new]
    return "".join(parts)


messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": words},
        optional={
            "reasoning_content": words,
            "tool_calls": st.just([{"name": "f", "arguments": "{}"}]),
            "x": value,
        },
    ),
    max_size=4,
)


@FUZZ
@given(source=templates(), rows=messages)
def test_templates_render_or_are_rejected(source, rows):
    text = json.dumps({"messages": [*rows, {"role": "assistant", "content": "a"}]})
    try:
        conversation = parse_conversation(text.encode())
        check_parsed(source)
        template = ChatTemplate(source, {})
        renderings = ConversationRenderer(template, ["<|im_end|>"], ["<|im_start|>"]).render(conversation)
    except (BadLine, UserError, LimitExceeded):
        return
    for rendering in renderings:
        places = [0, *(place for span in rendering.spans for place in span), len(rendering.text)]
        assert rendering.spans and places == sorted(places)


def check_parsed(source: str) -> None:
    """Check that `check_template` rejects a template. It forks, so it is called only on failures."""
    try:
        ChatTemplate(source, {})
    except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError):
        check_template(source, "--chat_template t", ":")
        raise AssertionError("check_template let it pass") from None


# ---- configurations ----

FLAGS = b"learning_rate: 1.0e-5\ndata_files: [a, b]\nlr_scheduler_kwargs: {a: 1}\nbf16: true\n"


@pytest.fixture(scope="module")
def parser() -> Parser:
    return Parser()


@FUZZ
@given(
    raw=st.one_of(
        spoiled(FLAGS), st.dictionaries(words, value).map(lambda flags: yaml.safe_dump(flags).encode())
    )
)
def test_flags_in_a_file_are_read_or_rejected(tmp_path_factory, parser, raw):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(raw)
    try:
        parser.parse_known_args(expand_config(["--config", str(file)]))
    except UserError as error:
        assert str(error)


ZERO = json.loads((ROOT / "ds_config/zero3.json").read_text())
KEYS = st.sampled_from([*ZERO, *ZERO["zero_optimization"], "optimizer", "scheduler", "type", "params", "x"])
changed = st.dictionaries(KEYS, value | st.dictionaries(KEYS, value, max_size=2), max_size=3)


@FUZZ
@given(
    raw=st.one_of(
        spoiled(json.dumps(ZERO).encode()), changed.map(lambda new: json.dumps(ZERO | new).encode())
    )
)
def test_deepspeed_files_are_read_or_rejected(tmp_path_factory, raw):
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_bytes(raw)
    try:
        check_parts(read_deepspeed(str(file)), "--deepspeed ds.json")
    except UserError as error:
        assert str(error)


# ---- coverage-guided ----


@pytest.mark.slow
@pytest.mark.parametrize("target", ["lines", "templates", "flags", "deepspeed"])
def test_the_fuzzer_finds_no_errors(tmp_path, target):
    pytest.importorskip("atheris")  # there are wheels for Linux and some versions of Python
    words = [sys.executable, str(Path(ROOT) / "scripts/bench/fuzz.py"), target, "--seconds", str(SECONDS)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=4 * SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert executed and int(executed[1]) > 1000, done.stderr[-3000:]
    print(f"{target}: {executed[1]} inputs in {SECONDS} s")
