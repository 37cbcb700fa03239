"""Conversation -> text with the spans a model is taught, by any chat template.

The rule: a model is taught exactly what it would have to generate. Its turn begins where the prompt it gets
at inference, `render(messages[:i], add_generation_prompt=True)`, ends; it is over with the token that makes
generation stop. Spans are positions in the rendered text, found by comparing renderings, so no text inside a
message can open or close one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from dft.data.faults import BadLine

Message = dict[str, Any]
REFUSED = "the chat template refuses the conversation"
PLACEHOLDER = "Zq7Placeholder7qZ"
"""Stands for the text of a turn where only what the template writes around it matters. Any word will do: it
is looked for from the end of a rendering, behind all other messages."""


@dataclass
class Rendering:
    """One training sequence as text.

    Attributes:
        text: what the tokenizer reads.
        spans: [start, end) character ranges of `text` that are supervised, in order, not overlapping.
        stop_id: a stop token to append and supervise, for templates whose last turn has none of its own.
        endings: the stop token that ends each span, None where a span ends without one.
    """

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    stop_id: int | None = None
    endings: list[str | None] = field(default_factory=list)


class ChatTemplate:
    """A chat template, and the tokens that may end a turn of it.

    Args:
        source: Jinja.
        special_tokens: what the template may write by name (`bos_token`, `eos_token`, ...).
        stops: the tokens that make generation stop.
        specials: all special tokens of the vocabulary; the one behind a turn ends it if no stop does.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], stops: Mapping[str, int], specials: set[str]
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.stops = dict(stops)
        self.tags_spans = has_generation_tags(source)
        longest_first = sorted({*specials, *stops}, key=lambda token: (-len(token), token))
        never = "(?!)"
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or never)

    def render(self, messages: list[Message]) -> list[Rendering]:
        """The training sequences of one conversation, as text with supervised spans.

        Raises:
            BadLine: the template refuses these messages.
        """
        if self.tags_spans:
            return [self._render_tagged(messages)]
        full = self._render(messages)
        sequences = [Rendering(full)]
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index in reversed(turns):
            history = messages[: index + 1]
            upto = full if len(history) == len(messages) else self._render(history)
            start = self._turn_start(messages[:index], upto)
            end, ending = self._turn_end(upto, start, history)
            home = next((one for one in sequences if one.text.startswith(upto[:end])), None)
            if home is None:
                home = Rendering(upto)
                sequences.append(home)
            if ending is None:
                end, ending = self._stop_that_follows(home, end, history)
            home.spans.insert(0, (start, end))
            home.endings.insert(0, ending)
        # Turns were visited last to first; the reader of a dataset expects them first to last.
        return [one for one in reversed(sequences) if one.spans]

    # ---- spans from {% generation %} tags ----

    def _render_tagged(self, messages: list[Message]) -> Rendering:
        """The author of the template has marked the turns; what no model generates is trimmed off the marks.

        Some published templates tag the header too, or the newline after the end token.
        """
        text, tagged = self._call_template(messages, return_assistant_tokens_mask=True)
        rendering = Rendering(text)
        for start, end in tagged:
            start += self._tagged_header
            ending = None
            for match in self.special_pattern.finditer(text, start, end):
                if not text[match.end() : end].strip():
                    end, ending = match.end(), match.group()
                    break
            rendering.spans.append((start, end))
            rendering.endings.append(ending)
        return rendering

    @cached_property
    def _tagged_header(self) -> int:
        """How many characters of its own header the template tags as generated."""
        asked = [{"role": "user", "content": "."}, {"role": "assistant", "content": PLACEHOLDER}]
        try:
            text, spans = self._call_template(asked, return_assistant_tokens_mask=True)
        except BadLine:
            return 0
        tagged = bool(spans) and bool(self._header) and text.startswith(self._header, spans[0][0])
        return len(self._header) if tagged else 0

    # ---- where a turn starts ----

    @cached_property
    def _header(self) -> str:
        """What the template writes to prompt an answer; "" if it writes nothing."""
        asked = [{"role": "user", "content": "."}]
        try:
            prompt, base = self._render(asked, add_generation_prompt=True), self._render(asked)
        except BadLine:
            return ""
        return prompt[len(commonprefix([prompt, base])) :]

    def _turn_start(self, history: list[Message], upto: str) -> int:
        """Where in `upto` the prompt that inference would give the model ends."""
        if not history:
            return self._opening_start(upto)
        prompt = self._render(history, add_generation_prompt=True)
        if upto.startswith(prompt):
            return len(prompt)
        # The prompt goes on differently, say with an opened think tag. Where it parts from the answered turn
        # is asked of a placeholder, since an answer may share letters with the rest of the prompt by chance.
        answered = self._render([*history, {"role": "assistant", "content": PLACEHOLDER}])
        shared = commonprefix([prompt, answered, upto])
        if len(shared) >= len(commonprefix([prompt, self._render(history)])):
            return len(shared)
        # The template rewrites what stands before the header once it is answered; no word of that is taught.
        return len(commonprefix([answered[: answered.rfind(PLACEHOLDER)], upto]))

    def _opening_start(self, upto: str) -> int:
        """Where the turn starts in a conversation that the assistant opens.

        Templates that read `messages[0]` cannot render an empty history, and some write a default system turn
        only when there is a message. Then the header is looked for in front of a placeholder, where all
        text is the template's.
        """
        try:
            prompt = self._render([], add_generation_prompt=True)
        except BadLine:
            prompt = None
        if prompt is not None and upto.startswith(prompt):
            return len(prompt)
        answered = self._render([{"role": "assistant", "content": PLACEHOLDER}])
        before = commonprefix([answered[: answered.rfind(PLACEHOLDER)], upto])
        position = before.find(self._header) if self._header else -1
        return len(before) if position < 0 else position + len(self._header)

    # ---- where a turn ends ----

    def _turn_end(self, upto: str, start: int, history: list[Message]) -> tuple[int, str | None]:
        """The end of the turn that begins at `start`, and the stop token that ends it, if the turn has one.

        `history` ends with the turn, `upto` is its rendering.
        """
        # A message without special tokens of its own cannot be taken for the template's: the first stop token
        # behind the prompt is the end, and one rendering is saved.
        own_tokens = any(self.special_pattern.search(text) for text in strings_of(history[-1]))
        if not own_tokens:
            for match in self.special_pattern.finditer(upto, start):
                if match.group() in self.stops:
                    return match.end(), match.group()
        content_end = self._content_end(upto, start, history, own_tokens)
        tail = list(self.special_pattern.finditer(upto, content_end))
        match = next((one for one in tail if one.group() in self.stops), tail[0] if tail else None)
        if match is not None:
            return match.end(), match.group()
        return max(content_end, len(upto.rstrip())), None

    def _content_end(self, upto: str, start: int, history: list[Message], own_tokens: bool) -> int:
        """Where the template's closing of the last turn begins.

        What follows the last placeholder in its place holds no special token but the template's, and `upto`
        ends with it.
        """
        neutral = self._render([*history[:-1], with_placeholder(history[-1], self.special_pattern)])
        position = neutral.rfind(PLACEHOLDER)
        closing = neutral[position + len(PLACEHOLDER) :]
        if position >= 0 and upto.endswith(closing):
            return max(start, len(upto) - len(closing))
        if own_tokens:
            raise BadLine(
                f"messages[{len(history) - 1}] holds special tokens of the tokenizer, and where the turn "
                "ends cannot be told from how the chat template renders it",
                "special tokens inside a turn",
            )
        return start

    def _stop_that_follows(self, home: Rendering, end: int, history: list[Message]) -> tuple[int, str | None]:
        """For templates without an end-of-turn token: the model stops by beginning the next header (GLM-4).

        If the sequence goes on, that token is right there; behind the last turn it is found by rendering one
        more turn, and appended.
        """
        if home.text[end:].strip():
            match = self._stop_at(home.text, end)
            return (match.end(), match.group()) if match else (end, None)
        reply = "tool" if history[-1].get("tool_calls") else "user"
        try:
            longer = self._render([*history, {"role": reply, "content": "."}])
        except BadLine:
            return end, None
        match = self._stop_at(longer, end)
        if match is None or not longer.startswith(home.text[:end]):
            return end, None
        home.text, home.stop_id = longer[: match.start()], self.stops[match.group()]
        return match.start(), match.group()

    def _stop_at(self, text: str, position: int) -> re.Match[str] | None:
        """The stop token at a position, white space aside."""
        blank = len(text[position:]) - len(text[position:].lstrip())
        match = self.special_pattern.match(text, position + blank)
        return match if match and match.group() in self.stops else None

    # ---- rendering ----

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._call_template(messages, add_generation_prompt=add_generation_prompt)[0]

    def _call_template(self, messages: list[Message], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = render_jinja_template(
                [messages], chat_template=self.source, **options, **self.special_tokens
            )
        except jinja2.TemplateError as error:
            raise BadLine(f"{REFUSED}: {' '.join(str(error).split())}", REFUSED) from None
        # What an expression of a template can raise on data it was not written for.
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadLine(f"the chat template fails on the conversation: {reason}", REFUSED) from None
        return texts[0], spans[0] if spans else []


def has_generation_tags(template: str) -> bool:
    """Whether a `{% generation %}` block stands in the code of a template, not in a comment or a string."""
    tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    following = zip(tokens, tokens[1:], strict=False)
    return any(one[0] == "block_begin" and two == ("name", "generation") for one, two in following)


# ---- messages ----


def strings_of(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def with_placeholder(message: Message, special: re.Pattern[str]) -> Message:
    """The message with `PLACEHOLDER` for its content and for every other string that holds a special token.

    The rest stays, since templates check names and ids, and write separators only around what there is.
    """
    made = {key: value if key == "role" else _replaced(value, special) for key, value in message.items()}
    if message["content"].strip():
        made["content"] = PLACEHOLDER
    return made


def _replaced(value: Any, special: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return PLACEHOLDER if special.search(value) else value
    if isinstance(value, dict):
        return {_replaced(key, special): _replaced(inner, special) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, special) for inner in value]
    return value
