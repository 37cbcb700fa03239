"""Conversation -> (input_ids, labels): rendering by the chat template, and the spans a model is taught.

The rule: a model is taught exactly what it would have to generate. Its turn begins where the prompt it gets at
inference, `render(messages[:i], add_generation_prompt=True)`, ends; it is over with the token that makes
generation stop. Spans are positions in the rendered text, found by comparing renderings, so no text inside a
message can open or close one.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dft.constants import IGNORE_INDEX
from dft.data.reader import BadLine
from dft.errors import UserError

Message = dict[str, Any]
GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")


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


@dataclass(frozen=True)
class Example:
    """One training sequence as tokens: `labels[t]` is `input_ids[t]` where supervised, else -100."""

    input_ids: list[int]
    labels: list[int]
    endings: tuple[str | None, ...]


class ChatEncoder:
    """Renders and tokenizes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        stop_token_ids: what makes this model's generation stop besides the tokenizer's own eos
            (`generation_config.eos_token_id`).

    Raises:
        UserError: a tokenizer without character offsets, or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer without character offsets, which exact masks "
                "need; convert it to a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; pass --chat_template FILE")
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template()
        self.tags_spans = bool(GENERATION_TAG.search(self.template))
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        stops = {tokenizer.eos_token_id, *stop_token_ids} - {None}
        self.stops = {tokenizer.convert_ids_to_tokens(index): index for index in sorted(stops)}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted({*special, *self.stops}, key=len, reverse=True)
        never = "(?!)"
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or never)

    def encode(self, conversations: Sequence[list[Message]]) -> list[list[Example] | BadLine]:
        """Tokens and labels of each conversation; usually one sequence, several where history is rewritten.

        A conversation the template refuses gives the `BadLine` to report in its place.
        """
        rendered: list[list[Rendering] | BadLine] = []
        for messages in conversations:
            try:
                rendered.append(self.render(messages))
            except BadLine as error:
                rendered.append(error)
        texts = [one.text for group in rendered if not isinstance(group, BadLine) for one in group]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        return [
            group if isinstance(group, BadLine) else [to_example(one, next(encodings)) for one in group]
            for group in rendered
        ]

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
            end, ending = self._turn_end(upto, start, messages[index])
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

    def _render_tagged(self, messages: list[Message]) -> Rendering:
        text, spans = self._call_template(messages, return_assistant_tokens_mask=True)
        return Rendering(text, spans, endings=[self._ending_at(text, start, end) for start, end in spans])

    def _ending_at(self, text: str, start: int, end: int) -> str | None:
        """The special token that closes text[start:end], white space aside."""
        for match in self.special_pattern.finditer(text, start, end):
            if not text[match.end() : end].strip():
                return match.group()
        return None

    def _turn_start(self, history: list[Message], upto: str) -> int:
        """Where in `upto` the prompt that inference would give the model ends."""
        if history:
            prompt = self._render(history, add_generation_prompt=True)
        else:
            prompt = self._opening_prompt(upto)
        return len(prompt) if upto.startswith(prompt) else len(os.path.commonprefix([prompt, upto]))

    def _opening_prompt(self, upto: str) -> str:
        """The prompt of a conversation that the assistant opens.

        Templates that read `messages[0]` cannot render an empty history; then the generation prompt is learned
        from a conversation they can render. Only text of the template stands before its first occurrence.
        """
        try:
            return self._render([], add_generation_prompt=True)
        except BadLine:
            pass
        asked = [{"role": "user", "content": "."}]
        header = self._render(asked, add_generation_prompt=True)[len(self._render(asked)) :]
        position = upto.find(header)
        return upto[: position + len(header)] if header and position >= 0 else ""

    def _turn_end(self, upto: str, start: int, message: Message) -> tuple[int, str | None]:
        """The end of the turn that begins at `start`, and the stop token that ends it, if the turn has one."""
        content = message["content"].strip()
        position = upto.rfind(content, start) if content else -1
        content_end = position + len(content) if position >= 0 else start
        tail = list(self.special_pattern.finditer(upto, content_end))
        match = next((one for one in tail if one.group() in self.stops), tail[0] if tail else None)
        if match is not None:
            return match.end(), match.group()
        return max(content_end, len(upto.rstrip())), None

    def _stop_that_follows(self, home: Rendering, end: int, history: list[Message]) -> tuple[int, str | None]:
        """For templates without an end-of-turn token: the model stops by beginning the next header (GLM-4).

        If the sequence goes on, that token is right there; behind the last turn it is found by rendering one
        more turn, and appended.
        """
        match = self.special_pattern.match(home.text, end)
        if match and match.group() in self.stops:
            return match.end(), match.group()
        if home.text[end:].strip():
            return end, None
        reply = "tool" if history[-1].get("tool_calls") else "user"
        try:
            longer = self._render([*history, {"role": reply, "content": "."}])
        except BadLine:
            return end, None
        match = self.special_pattern.match(longer, end)
        if match and match.group() in self.stops and longer.startswith(home.text[:end]):
            home.text, home.stop_id = home.text[:end], self.stops[match.group()]
            return end, match.group()
        return end, None

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._call_template(messages, add_generation_prompt=add_generation_prompt)[0]

    def _call_template(self, messages: list[Message], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = render_jinja_template(
                [messages], chat_template=self.template, **options, **self.tokenizer.special_tokens_map
            )
        except jinja2.TemplateError as error:
            raise BadLine(f"the chat template refuses this conversation: {error.message}") from None
        except (TypeError, ValueError, KeyError) as error:
            raise BadLine(f"the chat template fails on this conversation: {error}") from None
        return texts[0], spans[0] if spans else []


def to_example(rendering: Rendering, encoding: Encoding) -> Example:
    """Labels from spans: a token is supervised when all of its characters lie inside a span."""
    ids = encoding.ids
    labels = [IGNORE_INDEX] * len(ids)
    length = len(rendering.text)
    for start, end in rendering.spans:
        first = first_token(encoding, start, length)
        if first < len(ids) and encoding.token_to_chars(first)[0] < start:
            first += 1  # it straddles the border: its first characters belong to the prompt
        last = first_token(encoding, end, length)
        labels[first:last] = ids[first:last]
    if rendering.stop_id is not None:
        ids = [*ids, rendering.stop_id]
        labels.append(rendering.stop_id)
    if labels:
        labels[0] = IGNORE_INDEX  # nothing precedes it, so nothing predicts it
    return Example(ids, labels, tuple(rendering.endings))


def first_token(encoding: Encoding, position: int, length: int) -> int:
    """Index of the first token at or after a character; characters that no token owns are passed over."""
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None:
            return token
    return len(encoding.ids)
