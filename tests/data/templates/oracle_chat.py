"""Conversations in the form that a chat template accepts, rendered with transformers alone.

Nothing here imports `dft`: the oracle must not share a mistake with the code that it judges.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import product
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

Message = dict[str, Any]
DATE = date(2024, 7, 26)
"""The date that training data are rendered with."""
REASONING = ("reasoning_content", "reasoning", "thinking")
MARKUP = r"</?[\w|.:-]{1,40}>|\[/?[A-Z_]{2,30}\]"
"""Tags that no header or answer may be cut in, even where the vocabulary has no token for them."""


class Unrenderable(Exception):
    """The template raises an error on these messages."""


class Form(NamedTuple):
    """Form of messages that a template accepts.

    Attributes:
        in_parts: roles whose content is a list of parts instead of a string.
        arguments_as_text: arguments of tool calls are a JSON string instead of an object.
        content_as_null: the content of a turn with only tool calls is null instead of "".
    """

    in_parts: frozenset[str] = frozenset()
    arguments_as_text: bool = False
    content_as_null: bool = False


ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
FORMS = [
    Form(roles, as_text, as_null)
    for roles, as_text, as_null in product(
        (frozenset[str](), ROLES, ROLES - {"tool"}, ROLES - {"assistant"}), (False, True), (False, True)
    )
]


@dataclass(frozen=True)
class Turn:
    """A message of a row, normalized.

    Attributes:
        role: its role.
        content: its text; parts are joined.
        reasoning: the reasoning under a key of its own, or "".
        calls: tool calls with arguments as an object.
        trained: whether an assistant turn is supervised.
        extra: all other keys.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[Message, ...] = ()
    trained: bool = True
    extra: Message = field(default_factory=dict)

    def message(self, form: Form) -> Message:
        message = {"role": self.role, **self.extra}
        content: Any = self.content
        if self.role in form.in_parts:
            content = [{"type": "text", "text": content}] if content else []
        if self.calls and not self.content.strip() and form.content_as_null:
            content = None
        message["content"] = content
        if self.reasoning:
            message |= dict.fromkeys(REASONING, self.reasoning)
        if self.calls:
            message["tool_calls"] = [with_arguments(call, form.arguments_as_text) for call in self.calls]
        return message


def with_all_reasoning_keys(message: Message) -> Message:
    """Return a message with its reasoning, even an empty one, under the keys that transformers fills."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def with_arguments(call: Message, as_text: bool) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    written = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    return {**call, "function": {**function, "arguments": written}}


def read_turn(raw: Mapping[str, Any]) -> Turn:
    """Return a message of a row as a `Turn`."""
    message = {key: value for key, value in raw.items() if value is not None}
    train, weight = message.pop("train", None), message.pop("weight", None)
    content = message.pop("content", "")
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    reasoning = next((message[key] for key in REASONING if message.get(key)), "")
    calls = message.pop("tool_calls", None) or ()
    if "function_call" in message:
        calls = [message.pop("function_call")]
    # An empty reasoning stays under its key, since templates test whether the key is there.
    dropped = {"role", *(key for key in REASONING if message.get(key))}
    extra = {key: value for key, value in message.items() if key not in dropped}
    trained = raw["role"] == "assistant" and train is not False and weight != 0
    return Turn(raw["role"], content, reasoning, tuple(map(read_call, calls)), trained, extra)


def read_call(raw: Mapping[str, Any]) -> Message:
    call = {key: value for key, value in raw.items() if value is not None}
    if "function" not in call:
        name, arguments = call.pop("name"), call.pop("arguments", {})
        call = {"type": "function", **call, "function": {"name": name, "arguments": arguments}}
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def read_row(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row. An empty system turn counts as absent."""
    turns = [read_turn(raw) for raw in row["messages"]]
    return [turn for turn in turns if turn.content.strip() or turn.role not in ("system", "developer")]


def read_tools(row: Mapping[str, Any]) -> list[Message] | None:
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


class Renderer:
    """Renders turns as at inference, with `apply_chat_template` of a tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template.
        tools: tool definitions of the conversation.
        variables: variables of the template.
        form: how messages are written.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: list[Message] | None,
        variables: Mapping[str, Any],
        form: Form,
    ) -> None:
        self.tokenizer, self.tools, self.variables, self.form = tokenizer, tools, variables, form
        self.source = tokenizer.get_chat_template()

    def text(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return the rendering of turns, with the generation prompt if `prompt`.

        Raises:
            Unrenderable: the template raises an error.
        """
        return self._apply(turns, prompt, tokenize=False)

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Return the token ids that the model gets at inference after these turns.

        Raises:
            Unrenderable: the template raises an error.
        """
        return list(self._apply(turns, True, tokenize=True))

    def empty_prompt(self) -> str | None:
        """Return the generation prompt of an empty conversation; None if the template raises an error."""
        try:
            return self._render([], True)
        except Exception:  # a template can raise anything
            return None

    def _apply(self, turns: Sequence[Turn], prompt: bool, tokenize: bool) -> Any:
        messages = [turn.message(self.form) for turn in turns]
        try:
            if self.form.content_as_null or "strftime_now" in self.source:
                text = self._render(messages, prompt)
                return self.ids(text) if tokenize else text
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                add_generation_prompt=prompt,
                tokenize=tokenize,
                return_dict=False,
                **self.variables,
            )
        except Exception as error:  # a template can raise anything
            raise Unrenderable(f"{type(error).__name__}: {error}") from error

    def _render(self, messages: list[Message], prompt: bool) -> str:
        """Render as `apply_chat_template`, which itself removes null contents and the function for dates."""
        values = {"strftime_now": DATE.strftime, **self.tokenizer.special_tokens_map, **self.variables}
        messages = [with_all_reasoning_keys(message) for message in messages]
        return _compile_jinja_template(self.source).render(
            messages=messages, tools=self.tools, documents=None, add_generation_prompt=prompt, **values
        )

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(list(ids), **options)


def is_visible(token: str) -> bool:
    """Return whether an added token is more than a run of white space, which SentencePiece writes as "▁"."""
    return bool(token.strip(" \t\r\n▁"))


def atoms_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that splits text into added tokens, tags and single characters."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()}
    added = sorted((content for content in contents if is_visible(content)), key=len)
    return re.compile("|".join([*map(re.escape, reversed(added)), MARKUP, r"(?s:.)"]))


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string inside a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def holds(text: str, piece: str) -> bool:
    """Return whether a text contains a piece, as it is or escaped as in JSON."""
    piece = piece.strip()
    escaped = (json.dumps(piece, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return piece in text or any(form in text for form in escaped)
