"""The page of `scripts/show_data.py --html`: conversations beside the tokens that a model is trained on."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from dft.data.batches.dataset import Sequences
from dft.data.conversations.conversation import Conversation
from dft.data.preparing.quality import FLAG_TEXTS
from dft.data.preparing.traits import flags_of
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.messages import reasoning_field
from dft.labels import IGNORE_INDEX
from dft.report.pages.run import render
from dft.report.pages.tokens import TextPiece, lines_of

MAX_REJECTED = 100
"""Number of rejected lines that the page lists."""


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of one kind.

    Attributes:
        lines: their text in lines and pieces; all lines but the last end with a newline.
        supervised: whether they are supervised.
        special: whether they are special tokens.
    """

    lines: list[list[TextPiece]]
    supervised: bool
    special: bool


@dataclass(frozen=True)
class MessageView:
    """A message of a conversation.

    Attributes:
        role: its role.
        supervised: whether it is supervised.
        weight: its weight in the loss.
        parts: (name, text) of its reasoning, its content, its tool calls and its other keys, as far as it has
            them. The content has no name.
    """

    role: str
    supervised: bool
    weight: float
    parts: list[tuple[str, str]]


@dataclass(frozen=True)
class SequenceView:
    """A sequence to show.

    Attributes:
        origin: its file and line.
        title: how long it is, and which part of its conversation.
        problems: what to check about it.
        messages: the messages of its conversation.
        tools: the tool definitions of its conversation as text, or "".
        runs: its tokens.
    """

    origin: str
    title: str
    problems: list[str]
    messages: list[MessageView]
    tools: str
    runs: list[TokenRun]


def data_page(
    dataset: Sequences,
    rows: Iterable[int],
    conversations: Mapping[int, Conversation],
    encoder: ChatEncoder,
    warnings: list[Mapping[str, Any]],
    summary: list[str],
    rejected: list[dict[str, Any]],
) -> str:
    """Return the HTML of a page of sequences, those with problems first.

    Args:
        dataset: an unpacked dataset.
        rows: the rows to show.
        conversations: the conversation of each row.
        encoder: has encoded the dataset.
        warnings: the warnings of the data report about this split.
        summary: lines of the data report.
        rejected: lines of rejected.jsonl.
    """
    views = [_view(dataset, row, conversations, encoder, warnings) for row in rows]
    views.sort(key=lambda view: not view.problems)
    return render(
        "data.html.jinja",
        views=views,
        problems=sum(bool(view.problems) for view in views),
        summary=summary,
        rejected=rejected[:MAX_REJECTED],
        more_rejected=max(len(rejected) - MAX_REJECTED, 0),
    )


def _view(
    dataset: Sequences,
    row: int,
    conversations: Mapping[int, Conversation],
    encoder: ChatEncoder,
    warnings: list[Mapping[str, Any]],
) -> SequenceView:
    ids, labels = dataset[row]["input_ids"].tolist(), dataset[row]["labels"].tolist()
    ((file, line),) = dataset.origins(row)
    part = dataset.part(row)
    supervised = sum(label != IGNORE_INDEX for label in labels)
    title = f"{len(ids):,} tokens, {supervised:,} supervised"
    if part.total > 1:
        title += f", sequence {part.number} of {part.total} of this conversation"
    if part.reason:
        title += f", which starts a new sequence because {part.reason}"
    conversation = conversations[row]
    stops = encoder.tokenizer.convert_tokens_to_ids(encoder.renderer.stops)
    origin = f"{dataset.files[file]}:{line}"
    return SequenceView(
        origin,
        title,
        _problems(ids, labels, stops) + _warned(conversation, origin, encoder, warnings),
        [
            MessageView(message["role"], is_supervised, conversation.weight(index), _message_parts(message))
            for index, (message, is_supervised) in enumerate(
                zip(conversation.messages, conversation.supervised, strict=True)
            )
        ],
        _as_json(conversation.tools) if conversation.tools else "",
        _token_runs(ids, labels, encoder.tokenizer),
    )


def _warned(
    conversation: Conversation, origin: str, encoder: ChatEncoder, warnings: list[Mapping[str, Any]]
) -> list[str]:
    """Return the texts of the warnings that are about a conversation, as far as it alone shows that."""
    flags = flags_of(conversation, encoder.special_tokens)
    own = {text for flag, text in FLAG_TEXTS.items() if flags & flag}
    return [item["text"] for item in warnings if item["text"] in own or origin in item["examples"]]


def _problems(ids: list[int], labels: list[int], stops: Collection[int]) -> list[str]:
    """Return what is unusual about the supervised tokens of a sequence."""
    is_supervised = [label != IGNORE_INDEX for label in labels]
    ends = [
        index
        for index, here in enumerate(is_supervised)
        if here and (index + 1 == len(ids) or not is_supervised[index + 1])
    ]
    problems = []
    if ends and ends[-1] + 1 == len(ids) and ids[-1] not in stops:
        problems.append("its last turn is cut: it ends within a supervised turn (--max_length)")
    elif any(ids[end] not in stops for end in ends):
        problems.append("a supervised turn ends without a token that stops generation")
    if ends and sum(is_supervised) <= len(ends):
        problems.append("only the ends of turns are supervised")
    return problems


def _message_parts(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = [("reasoning", reasoning_field(dict(message)) or ""), ("", message["content"])]
    parts += [("tool calls", _as_json(message["tool_calls"]))] if "tool_calls" in message else []
    shown = ("role", "content", "tool_calls", "reasoning_content", "thinking", "reasoning")
    parts += [
        (key, value if isinstance(value, str) else _as_json(value))
        for key, value in message.items()
        if key not in shown
    ]
    return [(name, text) for name, text in parts if text]


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _token_runs(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[TokenRun]:
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    runs = []
    pairs = zip(ids, labels, strict=True)
    for (is_supervised, is_special), group in groupby(
        pairs, key=lambda pair: (pair[1] != IGNORE_INDEX, pair[0] in special)
    ):
        text = tokenizer.decode(
            [token for token, _ in group], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        runs.append(TokenRun(lines_of(text), is_supervised, is_special))
    return runs
