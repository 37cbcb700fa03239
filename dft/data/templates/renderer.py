"""Renderer of conversations as text with supervised spans, for any chat template.

The model is trained on exactly the text it has to generate. A supervised span begins where the prompt at
inference, `render(messages[:i], add_generation_prompt=True)`, ends, and it includes the token that stops
generation. Spans are found by comparing renderings, so no text inside a message can open or close one.
"""

import re
from collections.abc import Mapping

from dft.data.conversations.conversation import Conversation
from dft.data.templates.lost_content import (
    check_calls,
    check_tools,
    find_lost_content,
    unrendered_role_error,
)
from dft.data.templates.rendering import Rendering
from dft.data.templates.spans import TurnBounds
from dft.data.templates.template import AdaptedChat, ChatTemplate


class ConversationRenderer:
    """Renderer for one chat template that also finds the supervised spans.

    Args:
        template: the chat template.
        stops: the tokens that stop generation, with their ids.
        special_tokens: all special tokens of the vocabulary. If no stop token follows a turn, the first of
            these that does ends the turn.
    """

    def __init__(self, template: ChatTemplate, stops: Mapping[str, int], special_tokens: set[str]) -> None:
        self.template = template
        self.stops = dict(stops)
        longest_first = sorted({*special_tokens, *stops}, key=lambda token: (-len(token), token))
        matches_nothing = "(?!)"
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or matches_nothing)
        self.turn_bounds = TurnBounds(template, self.stops, self.special_pattern)

    def render(self, conversation: Conversation) -> list[Rendering]:
        """Return the training sequences of a conversation.

        There is one sequence, or several if the template rewrites earlier turns as the conversation
        continues. The list is empty if no turn is supervised.

        Raises:
            BadLine: the template raises an error on these messages, or drops part of their content.
            LimitExceeded: the template exceeds a limit of `dft.data.sandbox.limits`.
        """
        if self.template.unrendered_role is not None:
            raise unrendered_role_error(self.template.unrendered_role)
        chat = AdaptedChat(self.template, conversation)
        tagged = self._render_tagged(chat) if self.template.compiled.has_generation_tags else None
        text = chat.render() if tagged is None else tagged.text
        if conversation.tools and not self.template.renders_tools:
            check_tools(chat, text)
        if self.template.call_style is None:
            check_calls(chat)
        if tagged is not None:
            return [tagged] if tagged.spans else []
        return self._render_compared(chat, text)

    def _render_compared(self, chat: AdaptedChat, text: str) -> list[Rendering]:
        """Find spans by comparing renderings.

        Args:
            chat: the conversation.
            text: the rendering of all its messages.
        """
        sequences = [Rendering(text)]
        count = len(chat.messages)
        # Process turns from last to first: an earlier turn joins a sequence that begins like its transcript.
        for index in reversed([index for index in range(count) if chat.conversation.supervised[index]]):
            # Rendering of the conversation up to and including this turn.
            transcript = text if index + 1 == count else chat.render(index + 1)
            start = self.turn_bounds.start(chat, index, transcript)
            error = find_lost_content(chat, index, transcript[start:])
            if error is not None:
                raise error
            end, ending = self.turn_bounds.end(chat, index, transcript, start)
            sequence = next((item for item in sequences if item.text.startswith(transcript[:end])), None)
            if sequence is None:
                sequence = Rendering(transcript)
                sequences.append(sequence)
            if ending is None:
                end, ending = self.turn_bounds.stop_after(chat, index, sequence, end)
            sequence.spans.insert(0, (start, end))
            sequence.endings.insert(0, ending)
        return [sequence for sequence in reversed(sequences) if sequence.spans]

    def _render_tagged(self, chat: AdaptedChat) -> Rendering | None:
        """Take spans from the {% generation %} blocks of the template.

        Some published templates also tag the header or the newline after the end token; these are removed
        from the span, since the model does not generate them.

        Returns:
            None if the blocks do not correspond to the assistant turns one by one, or if a supervised turn
            lost its reasoning or tool calls, possibly because it is not the last turn.
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
            if find_lost_content(chat, index, text[start:end], *chat.messages[index + 1 :]) is not None:
                return None
            start = min(start + self.template.tagged_header_length, end)
            end, ending = self._tagged_end(text, start, end)
            rendering.spans.append((start, end))
            rendering.endings.append(ending)
        return rendering

    def _tagged_end(self, text: str, start: int, end: int) -> tuple[int, str | None]:
        """Return the end of a tagged span, after its last special token, and that token if there is one."""
        for match in self.special_pattern.finditer(text, start, end):
            if not text[match.end() : end].strip():
                return match.end(), match.group()
        # Only the content is tagged, but the model generates the stop token too.
        following = self.special_pattern.match(text, end)
        if following and following.group() in self.stops:
            return following.end(), following.group()
        return end, None
