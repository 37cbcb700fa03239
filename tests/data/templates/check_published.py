"""Check the training sequences of chat templates against an independent judge, `oracle.py`.

    python scripts/get_tokenizers.py
    python -m tests.data.templates.check_published FOLDER --tokenizer FOLDER
    python -m tests.data.templates.check_published FOLDER --tokenizer FOLDER --only 'Qwen|Llama'

The folder contains a file NAME.jinja for each template, and optionally an index.json: a list of objects
with `name`, `family`, `bos_token`, `eos_token`, `stop_tokens`, `special_tokens` and `added_tokens`, as in
the files of the model. Every conversation of `corpus.py` is encoded with every template. A pair is

- exact: the judge agrees with every training sequence,
- refused: the conversation or the template is refused with a reason. The refusal is avoidable if the judge
  knows sequences that would be exact,
- wrong: the judge disagrees, or an error is not a refusal.

The tokenizer is real but the same for all templates. It loses its own special tokens and gets those of the
template: the ones in the index, and what looks like a special token in the template's source.
"""

import argparse
import json
import logging
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.selfcheck import check_conversation
from dft.errors import UserError
from tests.data.templates.corpus import CONVERSATIONS
from tests.data.templates.oracle import Fault, Oracle

Row = Mapping[str, Any]

SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\s'\"]{1,40}\|?>|<[^|<>\s'\"]{1,40}\|>|<｜[^｜<>\s'\"]{1,40}｜>|\[\|[^|\[\]\s'\"]{1,40}\|\]"
    r"|<(?:start|end)_of_\w+>|<(?:bos|eos|pad|unk|s)>|</s>|\[/?[A-Z_]{3,24}\]"
)
"""Matches what is nearly always a special token in the source of a chat template."""
ADDED_TOKEN = re.compile(r"</?(?:think|tool_call|tool_response)>")
"""Matches markers that most tokenizers have as single tokens that are not special."""
OUTCOMES = ("exact", "refused", "wrong")
MAX_NAMED = 6
"""Number of conversations that are named with each reason."""
MAX_REASON = 90
"""Number of characters of a reason that are printed."""
SECONDS = 180.0
"""Time that all conversations of one template may take together."""


class Pair(NamedTuple):
    """The outcome of one conversation under one template: exact, refused or wrong, with the reason."""

    template: str
    family: str
    conversation: str
    outcome: str
    reason: str
    avoidable: bool


class OutOfTime(BaseException):
    """Raised by the timer. Not an `Exception`, so that no handler takes it for an error of the template."""


@dataclass
class Published:
    """A published chat template and the tokens of its model, as index.json describes them."""

    name: str
    jinja: str
    family: str = "?"
    bos_token: str | None = None
    eos_token: str | None = None
    stop_tokens: list[str] = field(default_factory=list)
    special_tokens: list[str] = field(default_factory=list)
    added_tokens: list[str] = field(default_factory=list)

    def tokenizer(self, vocabulary: str, eos_token: str) -> PreTrainedTokenizerFast:
        """Return a tokenizer with the special tokens of this template.

        Args:
            vocabulary: the text of a tokenizer.json without added tokens.
            eos_token: the eos token if the index names none.
        """
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(vocabulary))
        eos = self.eos_token or eos_token
        named = [eos, self.bos_token, *self.stop_tokens, *self.special_tokens]
        special = dict.fromkeys([*filter(None, named), *SPECIAL_TOKEN.findall(self.jinja)])
        added = dict.fromkeys([*self.added_tokens, *ADDED_TOKEN.findall(self.jinja)])
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], True)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added if token not in special])
        tokenizer.eos_token = eos
        if self.bos_token:
            tokenizer.bos_token = self.bos_token
        tokenizer.chat_template = self.jinja
        return tokenizer


def read_folder(folder: Path, only: str) -> list[Published]:
    """Return the templates of a folder whose names match the regular expression `only`."""
    index = folder / "index.json"
    entries = json.loads(index.read_text(encoding="utf-8")) if index.exists() else []
    by_name = {entry["name"]: entry for entry in entries}
    names = Published.__dataclass_fields__
    return [
        Published(
            **{
                key: value
                for key, value in by_name.get(file.stem, {"name": file.stem}).items()
                if key in names
            },
            jinja=file.read_text(encoding="utf-8"),
        )
        for file in sorted(folder.glob("*.jinja"))
        if re.search(only, file.stem)
    ]


def plain_vocabulary(tokenizer_json: str, merges: int | None = None) -> str:
    """Return the text of a tokenizer.json without its added tokens and its post-processor.

    Args:
        tokenizer_json: the text of the file.
        merges: number of merges of a byte-level BPE to keep, None for all. With fewer, it loads faster.
    """
    content = json.loads(tokenizer_json) | {"added_tokens": [], "post_processor": None}
    if merges is not None:
        model = content["model"]
        model["merges"] = model["merges"][:merges]
        merged = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]}
        tokens = (token for token in model["vocab"] if len(token) == 1 or token in merged)
        model["vocab"] = {token: index for index, token in enumerate(tokens)}
    return json.dumps(content)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body of the context after some seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_template(
    template: Published, vocabulary: str, eos_token: str, rows: Mapping[str, Row]
) -> list[Pair]:
    """Return the outcome of every conversation under one template."""
    pairs: list[Pair] = []

    def add(conversation: str, outcome: str, reason: str = "", avoidable: bool = False) -> None:
        pairs.append(Pair(template.name, template.family, conversation, outcome, reason, avoidable))

    try:
        with time_limit(SECONDS):
            tokenizer = template.tokenizer(vocabulary, eos_token)
            stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in template.stop_tokens]
            oracle = Oracle(tokenizer, stop_ids)
            encoder = ChatEncoder(tokenizer, stop_ids)
            for name, row in rows.items():
                try:
                    sequences = encode(encoder, row)
                except (BadLine, UserError) as error:
                    add(name, "refused", str(error), avoidable=not oracle.obstacles(row, doubts=True))
                except Exception as error:  # a traceback is an outcome here
                    add(name, "wrong", f"{type(error).__name__}: {error}")
                else:
                    faults = oracle.judge(row, sequences)
                    add(name, "wrong" if faults else "exact", "; ".join(map(describe, faults)))
    except UserError as error:
        for name in rows:
            add(name, "refused", str(error), avoidable=True)
    except OutOfTime:
        for name in list(rows)[len(pairs) :]:
            add(name, "wrong", f"no result within {SECONDS:g} seconds")
    return pairs


def encode(encoder: ChatEncoder, row: Row) -> list[tuple[list[int], list[int]]]:
    """Return input ids and labels of the training sequences of a row, after the self-check.

    Raises:
        BadLine: the row cannot be used.
        UserError: the template cannot be used.
    """
    (sequences,) = encoder.sequences([parse_conversation(json.dumps(row).encode())])
    if isinstance(sequences, BadLine):
        raise sequences
    check_conversation(encoder, sequences)
    return [(example.input_ids.tolist(), example.labels.tolist()) for _, example in sequences]


def describe(fault: Fault) -> str:
    place = "" if fault.turn is None else f"messages[{fault.turn}]: "
    return f"{place}{fault.kind} ({fault.detail})"


def reason_kind(reason: str) -> str:
    """Return a reason without its remedy and what differs from one conversation to the next."""
    kind = re.split(r"; | \(|, in the prompt of ", reason)[0]
    kind = re.sub(r"^messages\[\d+\](?: and messages\[\d+\])?: |^the chat template ", "", kind)
    kind = re.sub(r"messages\[\d+\]", "a turn", kind.removeprefix("the chat template "))
    return re.sub(r", but writes .* after this one", "", kind)[:MAX_REASON]


def table(pairs: list[Pair]) -> str:
    """Return a Markdown table of the outcomes by family."""
    families: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        families[pair.family].append(pair)
    lines = [
        "| family | templates | exact | refused | avoidable | wrong | refused most often because |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for family, items in sorted(families.items(), key=lambda entry: entry[0].lower()):
        counts = Counter(pair.outcome for pair in items)
        refused = [pair for pair in items if pair.outcome == "refused"]
        reasons = Counter(reason_kind(pair.reason) for pair in refused)
        cells = [family, len({pair.template for pair in items}), counts["exact"], counts["refused"]]
        cells += [sum(pair.avoidable for pair in refused), counts["wrong"]]
        cells.append(
            "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2)).replace("|", "\\|")
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def show(pairs: list[Pair], seconds: float) -> None:
    """Print the numbers of one template, and the reasons of what is not exact."""
    counts = Counter(pair.outcome for pair in pairs)
    numbers = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    print(f"{pairs[0].template}: {numbers} ({seconds:.1f} s)", flush=True)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pair in pairs:
        if pair.outcome != "exact":
            outcome = f"{pair.outcome}, avoidable" if pair.avoidable else pair.outcome
            reasons[outcome, reason_kind(pair.reason)].append(pair.conversation)
    for (outcome, reason), names in sorted(reasons.items()):
        print(f"  {outcome}: {reason} ({len(names)}: {', '.join(names[:MAX_NAMED])})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of NAME.jinja files, with or without an index.json")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer.json")
    parser.add_argument(
        "--merges", type=int, help="use the first merges of the tokenizer only; it loads faster"
    )
    parser.add_argument("--only", default="", help="regular expression that selects templates by name")
    parser.add_argument("--results", type=Path, help="append every pair to this file, as JSON lines")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    file = options.tokenizer / "tokenizer.json"
    vocabulary = plain_vocabulary(file.read_text(encoding="utf-8"), options.merges)
    config = json.loads((options.tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    templates = read_folder(options.folder, options.only)
    if not templates:
        raise SystemExit(f"{options.folder}: no file *.jinja with a name that matches {options.only!r}")
    pairs: list[Pair] = []
    for template in templates:
        start = time.monotonic()
        results = check_template(template, vocabulary, config["eos_token"], CONVERSATIONS)
        show(results, time.monotonic() - start)
        pairs += results
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in results)
    counts = Counter(pair.outcome for pair in pairs)
    print(f"\n{len(templates)} templates, {len(pairs)} pairs: {dict(counts)}\n\n{table(pairs)}")


if __name__ == "__main__":
    main()
