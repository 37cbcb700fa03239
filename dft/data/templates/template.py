"""Calling a chat template, and what it wants to be called with, found out by probes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import product
from os.path import commonprefix
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _render_with_assistant_indices,
)

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.turns import REASONING_KEYS
from dft.data.sandbox.limits import (
    EXCEEDS_TEXT,
    MAX_RENDERED_CHARACTERS,
    LimitExceeded,
    start_cpu_timer,
    stop_cpu_timer,
)

Message = dict[str, Any]
Rendered = tuple[str, list[tuple[int, int]]]
"""A text, and where in it stands what {% generation %} blocks hold."""
REFUSED = "the chat template refuses the conversation"
PLACEHOLDER = "Zq7Placeholder7qZ"
"""Stands for a text where only what the template does with it, or writes around it, matters. Any word will
do: it is looked for from the end of a rendering, behind all other messages."""
ARGUMENT = "zq7argument"
"""Stands for the name of an argument in a probe."""
DATE = date(2024, 7, 26)
"""Today, for templates that write the date, unless another is asked for. It stands still, so that the same
data is the same tokens tomorrow, on every rank, and when a run is resumed. It is the day that Llama 3's
templates write themselves when they are given none."""
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What an expression of a template can raise on data it was not written for."""


@dataclass(frozen=True)
class CallStyle:
    """How a template wants tool calls.

    Attributes:
        arguments_as_text: as a string of JSON, where it concatenates them (DeepSeek V3).
        content_as_null: a turn of nothing but calls has null for its content, not "" (DeepSeek R1).
    """

    arguments_as_text: bool = False
    content_as_null: bool = False


class Template:
    """A compiled chat template.

    Args:
        source: Jinja.
        special_tokens: what the template may write by name (`bos_token`, `eos_token`, ...).
        variables: what else it gets for every conversation; those of a conversation win.
        today: what `strftime_now` takes for today.

    Attributes:
        limited: whether a rendering that takes too long ends this process. To be set where that is no loss.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        today: date = DATE,
    ) -> None:
        self.limited = False
        self.writes_date = "strftime_now" in source
        self.today = today
        self.special_tokens = dict(special_tokens)
        self.variables = dict(variables or {})
        self.tags_spans = has_generation_tags(source)
        # Private functions of transformers, whose version is pinned: its `render_jinja_template` would first
        # rebuild every value it is given, which takes longer than the rendering. It guards templates against
        # objects with methods; ours are plain data out of JSON, and the sandbox keeps a template from
        # changing them.
        self.compiled = _compile_jinja_template(source)
        self.defaults = self.context()
        self._headers: dict[str, str] = {}

    # ---- calling ----

    def context(
        self, variables: Mapping[str, Any] | None = None, tools: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Everything the renderings of a conversation get but its messages."""
        merged = {
            "documents": None,
            "strftime_now": self.today.strftime,
            **self.special_tokens,
            **self.variables,
        }
        if variables:
            merged.update(variables)
        merged["tools"] = tools
        return merged

    def render(
        self, messages: list[Message], context: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> str:
        """The text of messages that went through `suited`.

        Raises:
            BadLine: the template refuses these messages.
            LimitExceeded: it writes too much text.
        """
        options = {**context, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._limited(lambda: (self.compiled.render(options), []))[0]

    def render_tagged(
        self, messages: list[Message], context: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The same, with the [start, end) characters of what stands in {% generation %} blocks."""
        options = {**context, "messages": messages, "add_generation_prompt": False}
        return self._limited(lambda: _render_with_assistant_indices(self.compiled, **options))

    def _limited(self, render: Callable[[], Rendered]) -> Rendered:
        if self.limited:
            start_cpu_timer()
        try:
            rendered = render()
        except (jinja2.TemplateError, *FAILURES) as error:
            raise refusal(error) from None
        finally:
            if self.limited:
                stop_cpu_timer()
        if len(rendered[0]) > MAX_RENDERED_CHARACTERS:
            raise LimitExceeded(EXCEEDS_TEXT)
        return rendered

    def shows(self, text: str, messages: list[Message], context: Mapping[str, Any]) -> bool:
        """Whether a text gets into the rendering of messages; not where the template refuses them."""
        try:
            return text in self.render(messages, context)
        except BadLine:
            return False

    # ---- messages as the template wants them ----

    def suited(self, message: Message) -> Message:
        """A message in the shape that this template renders: content in parts, reasoning by all its names."""
        if len(message) == 2 and not self.roles_in_parts:
            return message  # role and content, by far the most
        made = dict(message)
        if any(made.get(name) for name in REASONING_KEYS):
            (made,) = _alias_reasoning_fields([made])
        if made.get("tool_calls"):
            style = self.call_style or CallStyle()
            if style.arguments_as_text:
                made["tool_calls"] = [_with_text_arguments(call) for call in made["tool_calls"]]
            if style.content_as_null and not made["content"]:
                made["content"] = None
        if made["role"] in self.roles_in_parts and made["content"] is not None:
            made["content"] = in_parts(made["content"])
        return made

    def turn(self, role: str, content: str) -> Message:
        """A message of text, suited."""
        return self.suited({"role": role, "content": content})

    # ---- probes ----

    @cached_property
    def roles_in_parts(self) -> frozenset[str]:
        """The roles whose content must be a list of parts: as a string it fails or vanishes."""
        before = {"user": (), "assistant": ("user",), "system": (), "tool": ("user", "assistant")}
        found: set[str] = set()

        def message(role: str, text: str, parts: bool) -> Message:
            return {"role": role, "content": in_parts(text) if parts else text}

        for role, roles in before.items():
            chat = [message(one, ".", one in found) for one in roles]
            behind = [message("user", ".", "user" in found)] if role == "system" else []
            as_text, as_parts = (
                self.shows(PLACEHOLDER, [*chat, message(role, PLACEHOLDER, parts), *behind], self.defaults)
                for parts in (False, True)
            )
            if as_parts and not as_text:
                found.add(role)
        return frozenset(found)

    @cached_property
    def leaves_out(self) -> str | None:
        """The role, user or assistant, whose content does not get into an ordinary conversation."""
        for role in ("user", "assistant"):
            said = {"user": ".", "assistant": "."} | {role: PLACEHOLDER}
            try:
                text = self.render([self.turn(*one) for one in said.items()], self.defaults)
            except BadLine:
                return None  # a template that wants other conversations
            if PLACEHOLDER not in text:
                return role
        return None

    @cached_property
    def call_style(self) -> CallStyle | None:
        """How this template wants tool calls; None where no way gets a call with its arguments rendered."""
        asked = self.turn("user", ".")
        empty = in_parts("") if "assistant" in self.roles_in_parts else ""
        for as_null, as_text in product((False, True), (False, True)):
            function = {"name": "f", "arguments": {ARGUMENT: PLACEHOLDER}}
            # Nine letters and digits, which Mistral's templates insist on.
            call = {"type": "function", "id": "call00001", "function": function}
            answer = {
                "role": "assistant",
                "content": None if as_null else empty,
                "tool_calls": [_with_text_arguments(call) if as_text else call],
            }
            try:
                text = self.render([asked, answer], self.defaults)
            except BadLine:
                continue
            # Python's repr and JSON inside of JSON are what the wrong type gives.
            spoiled = f"'{ARGUMENT}'" in text or f'\\"{ARGUMENT}' in text
            if ARGUMENT in text and PLACEHOLDER in text and not spoiled:
                return CallStyle(arguments_as_text=as_text, content_as_null=as_null)
        return None

    @cached_property
    def renders_tools(self) -> bool:
        """Whether definitions of tools get into an ordinary conversation."""
        parameters = {"type": "object", "properties": {}}
        function = {"name": PLACEHOLDER, "description": ".", "parameters": parameters}
        context = self.context(tools=[{"type": "function", "function": function}])
        return self.shows(PLACEHOLDER, [self.turn("user", ".")], context)

    def header(self, variables: Mapping[str, Any]) -> str:
        """What the template writes to prompt an answer; "" if it writes nothing."""
        key = json.dumps(variables, sort_keys=True) if variables else ""
        if key not in self._headers:
            asked, context = [self.turn("user", ".")], self.context(variables)
            try:
                prompt, base = self.render(asked, context, True), self.render(asked, context)
            except BadLine:
                prompt = base = ""
            self._headers[key] = prompt[len(commonprefix([prompt, base])) :]
        return self._headers[key]

    @cached_property
    def tagged_header(self) -> int:
        """How many characters of its own header the template tags as generated."""
        header = self.header({})
        try:
            asked = [self.turn("user", "."), self.turn("assistant", PLACEHOLDER)]
            text, spans = self.render_tagged(asked, self.defaults)
        except BadLine:
            return 0
        return len(header) if spans and header and text.startswith(header, spans[0][0]) else 0


class Chat:
    """A conversation as the template gets it.

    Attributes:
        messages: suited, in step with those of `conversation`.
        context: what every rendering of it gets besides.
    """

    __slots__ = ("context", "conversation", "messages", "template")

    def __init__(self, template: Template, conversation: Conversation) -> None:
        self.template = template
        self.conversation = conversation
        self.messages = [template.suited(message) for message in conversation.messages]
        self.context = template.context(conversation.variables, conversation.tools)

    def render(self, count: int | None = None, *more: Message, prompt: bool = False) -> str:
        """The first `count` messages (all by default) and some more, which are suited already."""
        messages = self.messages if count is None else self.messages[:count]
        if more:
            messages = [*messages, *more]
        return self.template.render(messages, self.context, prompt)


def refusal(error: Exception) -> BadLine:
    """What a template raised on a conversation, as what is wrong with the line."""
    if isinstance(error, jinja2.TemplateError):
        return BadLine(f"{REFUSED}: {' '.join(str(error).split())}", REFUSED)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return BadLine(f"the chat template fails on the conversation: {reason}", REFUSED)


def has_generation_tags(template: str) -> bool:
    """Whether a `{% generation %}` block stands in the code of a template, not in a comment or a string."""
    tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    following = zip(tokens, tokens[1:], strict=False)
    return any(one[0] == "block_begin" and two == ("name", "generation") for one, two in following)


def in_parts(text: str) -> list[dict[str, str]]:
    """Text as the list of one part."""
    return [{"type": "text", "text": text}]


def reasoning_of(message: Message) -> str | None:
    """The reasoning of a message, if it has any."""
    return next((message[name] for name in REASONING_KEYS if message.get(name)), None)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
