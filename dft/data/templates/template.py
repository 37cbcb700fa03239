"""Chat template, with probes that determine the message format it expects."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import product
from typing import Any

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.turns import REASONING_KEYS
from dft.data.templates.compiled_template import CompiledTemplate, alias_reasoning
from dft.data.templates.messages import PLACEHOLDER, Message, as_parts, with_text_arguments

ARGUMENT = "zq7argument"
"""Name of the argument in the tool call of a probe."""
DATE = date(2024, 7, 26)
"""Default date for templates that write today's date.

The date is fixed so that the same data gives the same tokens on every day, on every rank and after a resume.
It is the default date of Llama 3 templates.
"""


@dataclass(frozen=True)
class CallStyle:
    """The tool call format that a template expects.

    Attributes:
        arguments_as_text: arguments are a JSON string, because the template concatenates them (DeepSeek V3).
        content_as_null: the content of a turn with only tool calls is null, not "" (DeepSeek R1).
    """

    arguments_as_text: bool = False
    content_as_null: bool = False


class ChatTemplate:
    """A chat template that adapts messages to the form it expects before it renders them.

    Args:
        source: Jinja source.
        special_tokens: tokens that the template may write by name (`bos_token`, `eos_token`, ...).
        variables: further variables for all conversations; the variables of a conversation take precedence.
        today: the date that `strftime_now` returns.

    Attributes:
        compiled: the compiled template. Set `compiled.limited` in worker processes.
        writes_date: whether the template may write today's date.
        defaults: the variables of a conversation that does not define any.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        today: date = DATE,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.variables = dict(variables or {})
        self.today = today
        self.writes_date = "strftime_now" in source
        self.compiled = CompiledTemplate(source)
        self.defaults = self.context()

    def context(
        self, variables: Mapping[str, Any] | None = None, tools: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return everything except the messages that is needed to render a conversation."""
        return {
            "documents": None,
            "strftime_now": self.today.strftime,
            **self.special_tokens,
            **self.variables,
            **(variables or {}),
            "tools": tools,
        }

    def render(
        self, messages: list[Message], context: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> str:
        """Return the rendering of adapted messages.

        Raises:
            BadLine: the template raises an error on these messages.
            LimitExceeded: the text is too long.
        """
        return self.compiled.render(
            {**context, "messages": messages, "add_generation_prompt": add_generation_prompt}
        )

    def render_tagged(
        self, messages: list[Message], context: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Like `render`, with the [start, end) character ranges of {% generation %} blocks."""
        return self.compiled.render_tagged({**context, "messages": messages, "add_generation_prompt": False})

    def shows(self, text: str, messages: list[Message], context: Mapping[str, Any]) -> bool:
        """Return whether the rendering of messages contains a text; False if rendering raises an error."""
        try:
            return text in self.render(messages, context)
        except BadLine:
            return False

    def adapt(self, message: Message) -> Message:
        """Return a message in the form that this template renders.

        Content becomes a list of parts if the template needs that, tool calls follow `call_style`, and
        reasoning is stored under all keys that templates read.
        """
        if len(message) == 2 and not self.roles_in_parts:
            return message  # common case: only role and content
        adapted = dict(message)
        if any(name in adapted for name in REASONING_KEYS):
            adapted = alias_reasoning(adapted)
        if adapted.get("tool_calls"):
            style = self.call_style or CallStyle()
            if style.arguments_as_text:
                adapted["tool_calls"] = [with_text_arguments(call) for call in adapted["tool_calls"]]
            if style.content_as_null and not adapted["content"]:
                adapted["content"] = None
        if adapted["role"] in self.roles_in_parts and adapted["content"] is not None:
            adapted["content"] = as_parts(adapted["content"])
        return adapted

    def turn(self, role: str, content: str) -> Message:
        """Return an adapted message of plain text."""
        return self.adapt({"role": role, "content": content})

    def opening(self, context: Mapping[str, Any]) -> list[Message]:
        """Return the turns that a conversation must begin with, a system turn for some templates."""
        question, system = self.turn("user", "."), self.turn("system", ".")
        accepts_question = self.shows("", [question], context)
        return [system] if not accepts_question and self.shows("", [system, question], context) else []

    @cached_property
    def roles_in_parts(self) -> frozenset[str]:
        """Roles whose content must be a list of parts, since the template fails on or drops a string."""
        earlier_roles = {
            "user": (), "assistant": ("user",), "system": (), "developer": (), "tool": ("user", "assistant")
        }  # fmt: skip
        in_parts: set[str] = set()

        def message(role: str, text: str, parts: bool) -> Message:
            return {"role": role, "content": as_parts(text) if parts else text}

        for role, before in earlier_roles.items():
            history = [message(earlier, ".", earlier in in_parts) for earlier in before]
            after = [message("user", ".", "user" in in_parts)] if role in ("system", "developer") else []
            shows_text, shows_parts = (
                self.shows(PLACEHOLDER, [*history, message(role, PLACEHOLDER, parts), *after], self.defaults)
                for parts in (False, True)
            )
            if shows_parts and not shows_text:
                in_parts.add(role)
        return frozenset(in_parts)

    @cached_property
    def unrendered_role(self) -> str | None:
        """Role ("user" or "assistant") whose content the template drops; None if it drops neither."""
        for role in ("user", "assistant"):
            contents = {"user": ".", "assistant": "."} | {role: PLACEHOLDER}
            try:
                text = self.render([self.turn(*item) for item in contents.items()], self.defaults)
            except BadLine:
                return None  # the template expects a different kind of conversation
            if PLACEHOLDER not in text:
                return role
        return None

    @cached_property
    def call_style(self) -> CallStyle | None:
        """Tool call style with which the template renders all arguments; None if none works."""
        question = self.turn("user", ".")
        empty = as_parts("") if "assistant" in self.roles_in_parts else ""
        for as_null, as_text in product((False, True), (False, True)):
            function = {"name": "f", "arguments": {ARGUMENT: PLACEHOLDER}}
            # Mistral templates require ids of nine letters and digits.
            call = {"type": "function", "id": "call00001", "function": function}
            answer = {
                "role": "assistant",
                "content": None if as_null else empty,
                "tool_calls": [with_text_arguments(call) if as_text else call],
            }
            try:
                text = self.render([question, answer], self.defaults)
            except BadLine:
                continue
            # Arguments of the wrong type are rendered as a Python dict or as JSON inside a JSON string.
            wrong_type = f"'{ARGUMENT}'" in text or f'\\"{ARGUMENT}' in text
            if ARGUMENT in text and PLACEHOLDER in text and not wrong_type:
                return CallStyle(arguments_as_text=as_text, content_as_null=as_null)
        return None

    @cached_property
    def renders_tools(self) -> bool:
        """True if the template renders tool definitions in an ordinary conversation."""
        parameters = {"type": "object", "properties": {}}
        function = {"name": PLACEHOLDER, "description": ".", "parameters": parameters}
        context = self.context(tools=[{"type": "function", "function": function}])
        return self.shows(PLACEHOLDER, [self.turn("user", ".")], context)


class AdaptedChat:
    """A conversation with its messages adapted to a chat template.

    Args:
        template: the chat template.
        conversation: the conversation as it was read.

    Attributes:
        messages: adapted messages, one for each of `conversation.messages`.
        context: everything else that is needed to render it.
    """

    __slots__ = ("context", "conversation", "messages", "template")

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self.template = template
        self.conversation = conversation
        self.messages = [template.adapt(message) for message in conversation.messages]
        self.context = template.context(conversation.variables, conversation.tools)

    def place(self, index: int) -> str:
        """Return where the row has a message, for error messages."""
        return self.conversation.place(index)

    def render(self, count: int | None = None, *more: Message, prompt: bool = False) -> str:
        """Return the rendering of the first `count` messages followed by others.

        Args:
            count: number of messages of this conversation; None for all.
            more: adapted messages to append.
            prompt: whether to add the generation prompt.

        Raises:
            BadLine: the template raises an error on these messages.
            LimitExceeded: the text is too long.
        """
        messages = self.messages if count is None else self.messages[:count]
        if more:
            messages = [*messages, *more]
        return self.template.render(messages, self.context, prompt)

    def render_tagged(self, count: int) -> tuple[str, list[tuple[int, int]]]:
        """Like `render` of the first messages, with the character ranges of {% generation %} blocks."""
        return self.template.render_tagged(self.messages[:count], self.context)
