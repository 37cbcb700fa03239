"""Tokens that end the turns of a chat template."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dft.data.conversations.faults import BadLine
from dft.data.templates.markers import Markers
from dft.data.templates.messages import PLACEHOLDER
from dft.data.templates.template import AdaptedChat, ChatTemplate


@dataclass(frozen=True)
class TurnEnd:
    """Where the end of a turn is, in the text that follows the turn's own text.

    Attributes:
        text: the text to generate after the turn's own text, including the end-of-turn token.
        token: the end-of-turn token, None if the template has none.
        is_next_header: whether the token is not part of the turn, but begins the header of the next one.
    """

    text: str
    token: str | None
    is_next_header: bool = False


class TurnEnds:
    """Finds the ends of the turns of one chat template, for one set of variables.

    Args:
        template: the chat template.
        markers: special tokens and tags.
        stops: tokens at which generation stops.
        context: everything besides the messages that is needed to render a conversation.

    Attributes:
        plain: the end of a turn of plain text, None if the template has no end-of-turn tokens.
        tokens: tokens that end a turn: those at which generation stops and that of `plain`.
        header_tokens: added tokens in the headers of turns.
    """

    def __init__(
        self, template: ChatTemplate, markers: Markers, stops: Iterable[str], context: Mapping[str, object]
    ) -> None:
        self.markers = markers
        self.stops = frozenset(stops)
        self.plain: TurnEnd | None = None
        self.tokens = self.stops
        self.header_tokens: frozenset[str] = frozenset()
        question, answer = template.turn("user", "."), template.turn("assistant", PLACEHOLDER)
        turns = [*template.opening(context), question, answer, question]
        try:
            answered = template.render(turns[:-1], context)
            closing = _after_placeholder(answered)
            following = _after_placeholder(template.render(turns, context))
        except BadLine:
            return  # the template expects another kind of conversation
        if closing is None:
            return
        headers = (answered.partition(PLACEHOLDER)[0], following or "")
        self.header_tokens = frozenset(
            match.group() for text in headers for match in markers.token_matches(text)
        )
        end = self._plain_end(closing, closing if following is None else following)
        if end is not None:
            self.plain = end
            self.tokens = self.stops if end.is_next_header else self.stops | {end.token or ""}

    def _plain_end(self, closing: str, following: str) -> TurnEnd | None:
        """Return the end of a plain answer: the first stop token after it, else its first special token."""
        shared = self.markers.shared_prefix(closing, following)
        tokens = [match for match in self.markers.token_matches(closing) if match.end() <= shared]
        tokens = tokens or self._first_token(closing)
        stops = [match for match in tokens if match.group() in self.stops]
        for match in stops or tokens:
            return TurnEnd(closing[: match.end()], match.group())
        return self._next_header(closing, following)

    def find(self, closing: str, following: str | None) -> TurnEnd | None:
        """Return the end of a turn, or None if the turn has no end-of-turn token although others do.

        Args:
            closing: the text after the turn's own text in the rendering that ends with the turn.
            following: the same in a rendering with one more turn, None if there is no such rendering.
        """
        shared = len(closing) if following is None else self.markers.shared_prefix(closing, following)
        for match in self.markers.token_matches(closing):
            if match.end() <= shared and match.group() in self.tokens:
                return TurnEnd(closing[: match.end()], match.group())
        # The last turn may end with another token, or other white space, than in a longer rendering.
        for match in self._first_token(closing[shared:]):
            if match.group() in self.tokens:
                return TurnEnd(closing[: shared + match.end()], match.group())
        if following is not None and (end := self._next_header(closing, following)):
            return end
        # The template may render the turn differently once it is followed by another one.
        for match in self.markers.token_matches(closing):
            if match.group() in self.tokens:
                return TurnEnd(closing[: match.end()], match.group())
            if match.group() in self.header_tokens:
                break
        return TurnEnd(closing[:shared].rstrip(), None) if self.plain is None else None

    def _first_token(self, text: str) -> list[re.Match[str]]:
        """Return the match of an added token at the start of a text, after any white space, as a list."""
        match = next(self.markers.token_matches(text), None)
        return [match] if match is not None and not text[: match.start()].strip() else []

    def _next_header(self, closing: str, following: str) -> TurnEnd | None:
        """Return the end of a turn that only the next header ends, if its first token stops generation."""
        shared = self.markers.shared_prefix(closing, following)
        if closing[shared:].strip():
            return None
        for match in self._first_token(following[shared:]):
            if match.group() in self.stops:
                return TurnEnd(following[: shared + match.end()], match.group(), is_next_header=True)
        return None

    def written_before(self, text: str) -> str | None:
        """Return the first token in a text that ends turns, None if there is none."""
        matches = (match.group() for match in self.markers.token_matches(text))
        return next((token for token in matches if token in self.tokens), None)


def next_turns(chat: AdaptedChat, index: int) -> list[dict[str, object]]:
    """Return turns that may follow a turn, adapted to the template, the most likely one first."""
    message = chat.conversation.messages[index]
    following = chat.messages[index + 1 : index + 2]
    candidates = [turn for turn in following if turn["role"] != "assistant"]
    if message.get("tool_calls"):
        call = message["tool_calls"][0]
        result = {"role": "tool", "content": ".", "name": call["function"]["name"]}
        candidates.append(chat.template.adapt({**result, "tool_call_id": call.get("id", "call00001")}))
    return [*candidates, chat.template.turn("user", ".")]


def _after_placeholder(text: str) -> str | None:
    _, placeholder, after = text.rpartition(PLACEHOLDER)
    return after if placeholder else None
