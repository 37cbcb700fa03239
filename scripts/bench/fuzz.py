"""Fuzz the code that reads a user's files, guided by coverage (pip install atheris).

    python scripts/bench/fuzz.py lines --seconds 300        data files: .jsonl, .json, compressed or not
    python scripts/bench/fuzz.py templates --seconds 300    chat templates, and conversations rendered by them
    python scripts/bench/fuzz.py flags --seconds 300        --config FILE.yaml
    python scripts/bench/fuzz.py deepspeed --seconds 300    --deepspeed FILE.json

For every input, the code must either succeed or report the problem, by a `UserError` or by a record with the
reason. Any other exception ends the fuzzer with a traceback and writes the input to crash-*. Statistics of
the executed code are printed at the end.
"""

import argparse
import json
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["dft", "jinja2", "yaml", "json"]):
    import jinja2

    import dft.data.sandbox.limits
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
    from dft.data.templates.tokenizer import CHATML
    from dft.errors import UserError

SECONDS = 2
"""CPU time limit of one template. A run allows 10 seconds, in a separate process."""
MEMORY = 2 << 30
LONGEST = 4096
"""Maximum size of an input in bytes."""
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet")
LINE = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
SHAREGPT = b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n'
PAIR = b'{"prompt": "q", "completion": "a", "tools": [], "system": "s", "chat_template_kwargs": {"k": 1}}\n'
TALK = LINE.replace(b'"content": "a"', b'"content": "a", "tool_calls": [{"name": "f", "arguments": "{}"}]')
ARRAY = b"[" + LINE + b"," + LINE + b"]"
PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ m.role + '\n' }}",
    "{% if m.role == 'user' %}", "{% elif loop.first %}", "{% else %}", "{% endif %}", "{% generation %}",
    "{% endgeneration %}", "{% set x = messages[0] %}", "{% set ns = namespace(a=1) %}", "{% set ns.a = x %}",
    "{{ ns.a }}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(m) }}", "{{ m | tojson(indent=2) }}",
    "{{ messages | length }}", "{{ x | default('y') | trim }}", "{{ raise_exception('no') }}", "{% break %}",
    "{% continue %}", "{{ strftime_now('%d') }}", "{{ eos_token }}", "{{ ''.__class__ }}", "{{ range(9) }}",
    "{{ m.content.split('</think>')[-1] }}", "{{ m.content[::-1] }}", "{{ 1 / 0 }}", "{{ m.items() | list }}",
    "{% for k, v in m.items() %}", "{{ '%s' % m }}", "{{ '{}'.format(m) }}", "{{ tools }}", "{{ m.x.y }}",
    "{%- if add_generation_prompt -%}", "<|im_start|>", "<|im_end|>\n", "assistant\n", "{# c #}", "{% raw %}",
    "{% endraw %}", "{{ m.tool_calls[0].function }}", "{% call f(1) %}", "{% endcall %}", "{{ caller() }}",
    "{% filter upper %}", "{% endfilter %}", "{{ messages | map('upper') | join(',') }}", "{{ self }}",
    "{{ messages | groupby('role') }}", "{{ messages | sort }}", "{% include m %}", "{% extends 'x' %}",
    "{% block b %}", "{% endblock %}", "{{ loop.index0 }}", "{{ cycler(1, 2).next() }}", "{{ m is mapping }}",
)  # fmt: skip
"""Fragments that fuzzed templates are built from."""
ROW_KEYS = [
    "messages", "conversations", "prompt", "completion", "tools", "system", "chat_template_kwargs", "role",
    "content", "from", "value", "user", "assistant", "gpt", "tool", "name", "arguments", "function", "type",
    "tool_calls", "function_call", "reasoning_content", "thinking", "train", "weight", "text", "{}", "", "id",
]  # fmt: skip
"""Keys and values that occur in conversations."""
DEEPSPEED_KEYS = [
    "zero_optimization", "stage", "bf16", "fp16", "enabled", "optimizer", "type", "params", "scheduler", "lr",
    "Adam", "AdamW", "SGD", "WarmupLR", "auto", "gradient_clipping", "offload_optimizer", "device", "cpu",
    "overlap_comm", "train_batch_size", "loss_scale", "tensor_parallel", "amp", "pin_memory", "betas", "nvme",
    "warmup_num_steps", "data_types", "grad_accum_dtype", "activation_checkpointing", "cpu_offload", "x",
]  # fmt: skip


class OutOfTime(BaseException):
    """A template exceeded its time limit; a run would have ended the process that renders it."""


def json_value(data: atheris.FuzzedDataProvider, keys: list[str], depth: int = 0) -> Any:
    """Build a JSON value from fuzzed bytes."""
    kind = data.ConsumeIntInRange(0, 9)
    if kind < 5 and depth < 5 and data.remaining_bytes():
        items = range(data.ConsumeIntInRange(0, 3))
        if kind < 2:
            return [json_value(data, keys, depth + 1) for _ in items]
        return {data.PickValueInList(keys): json_value(data, keys, depth + 1) for _ in items}
    if kind < 7:
        return data.PickValueInList(keys)
    return [None, data.ConsumeBool(), data.ConsumeInt(4), data.ConsumeFloat(), data.ConsumeUnicode(5)][
        kind % 5
    ]


def read_lines(raw: bytes, folder: Path) -> None:
    """Read a data file; the first byte selects its suffix, and whether the rest is its text or makes JSON."""
    first, raw = (raw[0], raw[1:]) if raw else (0, b"")
    suffix = SUFFIXES[first % len(SUFFIXES)]
    file = folder / f"a{suffix}"
    if first & 128:
        data = atheris.FuzzedDataProvider(raw)
        rows = [json_value(data, ROW_KEYS) for _ in range(data.ConsumeIntInRange(1, 3))]
        raw = b"\n".join(json.dumps(row).encode("utf-8", "surrogatepass") for row in rows)
    file.write_bytes(raw)
    for batch in read_batches(DataFile(str(file), file, *split_suffix(str(file)), 0)):
        for record in batch.records:
            if record.flaw is not None:
                assert record.flaw.reason and record.flaw.kind
                continue
            try:
                conversation = parse_conversation(record.text)
            except BadLine as error:
                assert str(error) and error.kind
                continue
            except RowLeftOut:  # a weight of 0
                continue
            assert any(conversation.supervised)
            assert all(type(message["content"]) is str for message in conversation.messages)


def render(raw: bytes, folder: Path) -> None:
    """Render a conversation with a template, both built from fuzzed bytes."""
    data = atheris.FuzzedDataProvider(raw)
    count = data.ConsumeIntInRange(0, 4)
    rows = [
        {
            "role": data.PickValueInList(["user", "assistant", "system", "tool"]),
            "content": data.ConsumeUnicodeNoSurrogates(data.ConsumeIntInRange(0, 8)) or ".",
            **data.PickValueInList(
                [{}, {"reasoning_content": "r"}, {"tool_calls": [{"name": "f"}]}, {"x": [1]}]
            ),
        }
        for _ in range(count)
    ]
    rows.append({"role": "assistant", "content": "a"})
    source = "" if data.ConsumeBool() else CHATML
    while data.remaining_bytes():
        position = data.ConsumeIntInRange(0, len(source))
        arbitrary = data.ConsumeProbability() < 0.2
        piece = data.ConsumeUnicode(4) if arbitrary else PIECES[data.ConsumeIntInRange(0, len(PIECES) - 1)]
        source = source[:position] + piece + source[position:]
    try:
        conversation = parse_conversation(json.dumps({"messages": rows}).encode())
    except BadLine:
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
        renderer = ConversationRenderer(template, ["<|im_end|>"], ["<|im_start|>"])
        for rendering in renderer.render(conversation):
            ends = [0, *(place for span in rendering.spans for place in span), len(rendering.text)]
            assert ends == sorted(ends) and rendering.spans
    except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError):
        pass  # the template cannot be parsed, which a run reports before it renders anything
    except (BadLine, LimitExceeded, MemoryError, OutOfTime):
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def read_flags(raw: bytes, folder: Path, parser: Parser) -> None:
    """Read a configuration file."""
    (folder / "flags.yaml").write_bytes(raw)
    try:
        parser.parse_known_args(expand_config(["--config", str(folder / "flags.yaml")]))
    except UserError as error:
        assert str(error)


def read_deepspeed_file(raw: bytes, folder: Path) -> None:
    """Read a DeepSpeed file: JSON of keys that DeepSpeed has, or the bytes unchanged."""
    file = folder / "ds.json"
    if raw[:1] > b"\x80":
        data = atheris.FuzzedDataProvider(raw[1:])
        content: dict[str, Any] = {
            name: {} for name in ("zero_optimization", "bf16", "optimizer", "scheduler")
        }
        for _ in range(data.ConsumeIntInRange(1, 4)):
            section = content
            while data.ConsumeBool() and isinstance(
                section.get(name := data.PickValueInList(DEEPSPEED_KEYS)), dict
            ):
                section = section[name]
            section[data.PickValueInList(DEEPSPEED_KEYS)] = json_value(data, DEEPSPEED_KEYS)
        raw = json.dumps(content).encode()
    file.write_bytes(raw)
    try:
        check_parts(read_deepspeed(str(file)), "--deepspeed ds.json")
    except UserError as error:
        assert str(error)


SEEDS = {
    "lines": [bytes([kind]) + text for kind in (0, 1) for text in (LINE * 2, SHAREGPT, PAIR, TALK, ARRAY)]
    + [bytes([kind, *range(start, start + 50)]) for kind in (130, 131) for start in (0, 60, 120)],
    "templates": [bytes(range(start, start + 64)) for start in range(0, 192, 16)],
    "flags": [
        b"learning_rate: 1.0e-5\ndata_files: [a, b]\n",
        b"max_length: 9\nlr_scheduler_kwargs: {a: 1, b: [2]}\n",
        b"a: &x [1]\nb: *x\n",
        b"a: !!bool yes\nb: !!timestamp 2020-01-01\nc: !!int 1\nd: !!float 1\ne: !!pairs [f: 1]\n",
        b"--- !!omap\n- a: 2020-01-01\n- b: !!binary aGk=\n",
        b"a: !!set {x, y}\n? b\n: ~\n",
    ],
    "deepspeed": [file.read_bytes() for file in (Path(__file__).parents[2] / "ds_config").glob("*.json")]
    + [bytes([255, *range(start, start + 50)]) for start in (0, 60, 120)],
}  # fmt: skip


def raise_out_of_time(_number: int, _frame: FrameType | None) -> NoReturn:
    raise OutOfTime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=SEEDS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer; 0: different each time")
    arguments = parser.parse_args()
    dft.data.sandbox.limits.MAX_CPU_SECONDS = SECONDS
    signal.signal(signal.SIGVTALRM, raise_out_of_time)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    flags = Parser()
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), Path(name) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS[arguments.target]):
            (corpus / str(number)).write_bytes(seed)
        targets: dict[str, Callable[[bytes], None]] = {
            "lines": lambda raw: read_lines(raw, folder),
            "templates": lambda raw: render(raw, folder),
            "flags": lambda raw: read_flags(raw, folder, flags),
            "deepspeed": lambda raw: read_deepspeed_file(raw, folder),
        }
        options = [
            f"-max_total_time={arguments.seconds}", f"-max_len={LONGEST}", "-timeout=30",
            f"-seed={arguments.seed}", "-print_final_stats=1", "-rss_limit_mb=4096", "-verbosity=1",
            str(corpus),
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], targets[arguments.target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
