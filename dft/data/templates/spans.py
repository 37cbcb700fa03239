"""Conversation -> text with the spans a model is taught, by any chat template.

The rule: a model is taught exactly what it would have to generate. Its turn begins where the prompt it gets
at inference, `render(messages[:i], add_generation_prompt=True)`, ends; it is over with the token that makes
generation stop. Spans are positions in the rendered text, found by comparing renderings, so no text inside a
message can open or close one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from os.path import commonprefix
from typing import Any

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.lost_content import check_calls, check_thinking, check_tools, omission, unread
from dft.data.templates.template import DATE, PLACEHOLDER, Chat, Message, Template


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
        variables: what the template gets for every conversation besides; those of a conversation win.
        today: what the template is told of today's date.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        stops: Mapping[str, int],
        specials: set[str],
        variables: Mapping[str, Any] | None = None,
        today: date = DATE,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.stops = dict(stops)
        self.variables = dict(variables or {})
        self.template = Template(source, special_tokens, variables, today)
        longest_first = sorted({*specials, *stops}, key=lambda token: (-len(token), token))
        never = "(?!)"
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or never)

    def render(self, conversation: Conversation) -> list[Rendering]:
        """The training sequences of one conversation, as text with supervised spans.

        Raises:
            BadLine: the template refuses these messages, or leaves out tools, calls or reasoning.
        """
        if self.template.leaves_out is not None:
            raise unread(self.template.leaves_out)
        chat = Chat(self.template, conversation)
        tagged = self._render_tagged(chat) if self.template.tags_spans else None
        full = chat.render() if tagged is None else tagged.text
        if conversation.tools and not self.template.renders_tools:
            check_tools(chat, full)
        if self.template.call_style is None:
            check_calls(chat)
        if tagged is not None:
            return [tagged] if tagged.spans else []
        sequences = [Rendering(full)]
        count = len(chat.messages)
        turns = [index for index in range(count) if conversation.supervised[index]]
        for index in reversed(turns):
            upto = full if index + 1 == count else chat.render(index + 1)
            start = self._turn_start(chat, index, upto)
            missing = omission(chat, index, upto[start:])
            if missing is not None:
                raise missing
            end, ending = self._turn_end(chat, index, upto, start)
            home = next((one for one in sequences if one.text.startswith(upto[:end])), None)
            if home is None:
                home = Rendering(upto)
                sequences.append(home)
            if ending is None:
                end, ending = self._stop_that_follows(chat, index, home, end)
            home.spans.insert(0, (start, end))
            home.endings.insert(0, ending)
        # Turns were visited last to first; the reader of a dataset expects them first to last.
        return [one for one in reversed(sequences) if one.spans]

    # ---- spans from {% generation %} tags ----

    def _render_tagged(self, chat: Chat) -> Rendering | None:
        """The author of the template has marked the turns; what no model generates is trimmed off the marks.

        Some published templates tag the header too, or the newline after the end token. None where the marks
        cannot be matched to the turns one by one, or where a trained turn has lost its reasoning or calls,
        which may be for no longer being the last.
        """
        conversation = chat.conversation
        text, tagged = self.template.render_tagged(chat.messages, chat.context)
        turns = [at for at, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(turns) != len(tagged):
            return None
        rendering = Rendering(text)
        for index, (start, end) in zip(turns, tagged, strict=True):
            if not conversation.supervised[index]:
                continue
            if omission(chat, index, text[start:end], *chat.messages[index + 1 :]) is not None:
                return None
            start = min(start + self.template.tagged_header, end)
            ending = None
            for match in self.special_pattern.finditer(text, start, end):
                if not text[match.end() : end].strip():
                    end, ending = match.end(), match.group()
                    break
            else:
                # Marks around nothing but the content; the model generates the end token too.
                match = self.special_pattern.match(text, end)
                if match and match.group() in self.stops:
                    end, ending = match.end(), match.group()
            rendering.spans.append((start, end))
            rendering.endings.append(ending)
        return rendering

    # ---- where a turn starts ----

    def _turn_start(self, chat: Chat, index: int, upto: str) -> int:
        """Where in `upto`, the rendering that ends with the turn, the prompt of inference ends."""
        if index == 0:
            return self._opening_start(chat, upto)
        prompt = chat.render(index, prompt=True)
        if upto.startswith(prompt):
            return len(prompt)
        # The prompt goes on differently, say with an opened think tag. Where it parts from the answered turn
        # is asked of a placeholder, since an answer may share letters with the rest of the prompt by chance.
        answered = chat.render(index, self.template.turn("assistant", PLACEHOLDER))
        shared = commonprefix([prompt, answered, upto])
        check_thinking(chat, index, prompt, upto)
        if len(shared) >= len(commonprefix([prompt, chat.render(index)])):
            return len(shared)
        # The template rewrites what stands before the header once it is answered; no word of that is taught.
        return len(commonprefix([answered[: answered.rfind(PLACEHOLDER)], upto]))

    def _opening_start(self, chat: Chat, upto: str) -> int:
        """Where the turn starts in a conversation that the assistant opens.

        Templates that read `messages[0]` cannot render an empty history, and some write a default system turn
        only when there is a message. Then the header is looked for in front of a placeholder, where all
        text is the template's.
        """
        try:
            prompt = chat.render(0, prompt=True)
        except BadLine:
            prompt = None
        if prompt is not None and upto.startswith(prompt):
            return len(prompt)
        answered = chat.render(0, self.template.turn("assistant", PLACEHOLDER))
        before = commonprefix([answered[: answered.rfind(PLACEHOLDER)], upto])
        header = self.template.header(chat.conversation.variables)
        position = before.find(header) if header else -1
        return len(before) if position < 0 else position + len(header)

    # ---- where a turn ends ----

    def _turn_end(self, chat: Chat, index: int, upto: str, start: int) -> tuple[int, str | None]:
        """The end of the turn that begins at `start`, and the stop token that ends it, if it has one."""
        # A message without special tokens of its own cannot be taken for the template's: the first stop token
        # behind the prompt is the end, and one rendering is saved.
        message = chat.conversation.messages[index]
        own_tokens = any(self.special_pattern.search(text) for text in strings_of(message))
        if not own_tokens:
            for match in self.special_pattern.finditer(upto, start):
                if match.group() in self.stops:
                    return match.end(), match.group()
        content_end = self._content_end(chat, index, upto, start, own_tokens)
        tail = list(self.special_pattern.finditer(upto, content_end))
        match = next((one for one in tail if one.group() in self.stops), tail[0] if tail else None)
        if match is not None:
            return match.end(), match.group()
        return max(content_end, len(upto.rstrip())), None

    def _content_end(self, chat: Chat, index: int, upto: str, start: int, own_tokens: bool) -> int:
        """Where the template's closing of the turn begins.

        What follows the last placeholder in its place holds no special token but the template's, and `upto`
        ends with it.
        """
        replaced = with_placeholder(chat.conversation.messages[index], self.special_pattern)
        neutral = chat.render(index, self.template.suited(replaced))
        position = neutral.rfind(PLACEHOLDER)
        closing = neutral[position + len(PLACEHOLDER) :]
        if position >= 0 and upto.endswith(closing):
            return max(start, len(upto) - len(closing))
        if own_tokens:
            raise BadLine(
                f"messages[{index}] holds special tokens of the tokenizer, and where the turn "
                "ends cannot be told from how the chat template renders it",
                "special tokens inside a turn",
            )
        return start

    def _stop_that_follows(self, chat: Chat, index: int, home: Rendering, end: int) -> tuple[int, str | None]:
        """For templates without an end-of-turn token: the model stops by beginning the next header (GLM-4).

        If the sequence goes on, that token is right there; behind the last turn it is found by rendering one
        more turn, and appended.

        Raises:
            BadLine: the next header is the assistant's own, which stops nothing.
        """
        goes_on = bool(home.text[end:].strip())
        if goes_on and (match := self._stop_at(home.text, end)):
            return match.end(), match.group()
        following = chat.conversation.messages[index + 1 : index + 2]
        if goes_on and not (following and following[0]["role"] == "assistant"):
            return end, None
        longer = self._with_one_more_turn(chat, index, home.text[:end])
        match = self._stop_at(longer, end)
        if match is None:
            return end, None
        if goes_on:
            raise BadLine(
                f"messages[{index}] and messages[{index + 1}] are both the assistant's, and the chat "
                "template has no token that ends the first; join them, or pass a template that ends all "
                "turns (--chat_template)",
                "a turn without an end",
            )
        home.text, home.stop_id = longer[: match.start()], self.stops[match.group()]
        return match.start(), match.group()

    def _with_one_more_turn(self, chat: Chat, index: int, text: str) -> str:
        """`text`, which ends with a turn, and what the template writes behind it if another side answers."""
        calls = chat.conversation.messages[index].get("tool_calls")
        reply = self.template.turn("tool" if calls else "user", ".")
        try:
            longer = chat.render(index + 1, reply)
            if longer.startswith(text):
                return longer
            # One more turn makes the template drop this turn's reasoning (GLM-4.5); another answer, of
            # nothing but text, is followed by the same header.
            longer = chat.render(index, self.template.turn("assistant", PLACEHOLDER), reply)
        except BadLine:
            return text
        return text + longer[longer.rfind(PLACEHOLDER) + len(PLACEHOLDER) :]

    def _stop_at(self, text: str, position: int) -> re.Match[str] | None:
        """The stop token at a position, white space aside."""
        blank = len(text[position:]) - len(text[position:].lstrip())
        match = self.special_pattern.match(text, position + blank)
        return match if match and match.group() in self.stops else None


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
