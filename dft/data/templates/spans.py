"""Start and end of the supervised span of an assistant turn, found by comparing renderings.

Throughout this module, the *transcript* of a turn is the rendering of the conversation up to and including
the turn. Positions are character offsets in it.
"""

import re
from collections.abc import Mapping
from os.path import commonprefix

from dft.data.conversations.faults import BadLine
from dft.data.templates.lost_content import check_thinking
from dft.data.templates.messages import PLACEHOLDER, strings_of, with_placeholders
from dft.data.templates.rendering import Rendering
from dft.data.templates.template import AdaptedChat, ChatTemplate


class TurnBounds:
    """Start and end of the supervised spans of assistant turns under one chat template.

    Args:
        template: the chat template.
        stops: the tokens that stop generation, with their ids.
        special_pattern: matches every special token of the vocabulary.
    """

    def __init__(
        self, template: ChatTemplate, stops: Mapping[str, int], special_pattern: re.Pattern[str]
    ) -> None:
        self.template = template
        self.stops = stops
        self.special_pattern = special_pattern

    def start(self, chat: AdaptedChat, index: int, transcript: str) -> int:
        """Return the position where the prompt at inference ends and the turn begins.

        Raises:
            BadLine: the prompt closes the thinking block of a turn with reasoning.
        """
        if index == 0:
            return self._opening_start(chat, transcript)
        prompt = chat.render(index, prompt=True)
        if transcript.startswith(prompt):
            return len(prompt)
        # The prompt ends differently, for example with an opened think tag. A placeholder as the answer shows
        # where prompt and answered turn diverge; the answer itself may share letters with the prompt by
        # chance.
        answered = chat.render(index, self.template.turn("assistant", PLACEHOLDER))
        shared = commonprefix([prompt, answered, transcript])
        check_thinking(chat, index, prompt, transcript)
        if len(shared) >= len(commonprefix([prompt, chat.render(index)])):
            return len(shared)
        # The template rewrites earlier messages once they are answered; these are never supervised.
        return len(commonprefix([answered[: answered.rfind(PLACEHOLDER)], transcript]))

    def _opening_start(self, chat: AdaptedChat, transcript: str) -> int:
        """Return the start of the turn in a conversation that begins with an assistant turn.

        Templates that read `messages[0]` cannot render an empty history, and some write a default system turn
        only if there is a message. For such templates, the generation prompt is located in the text before a
        placeholder answer, which consists only of template text.
        """
        try:
            prompt = chat.render(0, prompt=True)
        except BadLine:
            prompt = None
        if prompt is not None and transcript.startswith(prompt):
            return len(prompt)
        answered = chat.render(0, self.template.turn("assistant", PLACEHOLDER))
        before = commonprefix([answered[: answered.rfind(PLACEHOLDER)], transcript])
        header = self.template.generation_prompt(chat.conversation.variables)
        position = before.find(header) if header else -1
        return len(before) if position < 0 else position + len(header)

    def end(self, chat: AdaptedChat, index: int, transcript: str, start: int) -> tuple[int, str | None]:
        """Return the end of the turn that begins at `start`, and the stop token it ends with, if any.

        Raises:
            BadLine: the turn contains special tokens, and its end cannot be found.
        """
        # If the message contains no special token, the first stop token after the prompt is the template's,
        # which saves one rendering.
        message = chat.conversation.messages[index]
        has_special = any(self.special_pattern.search(text) for text in strings_of(message))
        if not has_special:
            for match in self.special_pattern.finditer(transcript, start):
                if match.group() in self.stops:
                    return match.end(), match.group()
        content_end = self._content_end(chat, index, transcript, start, has_special)
        specials = list(self.special_pattern.finditer(transcript, content_end))
        stops = [match for match in specials if match.group() in self.stops]
        if candidates := stops or specials:
            return candidates[0].end(), candidates[0].group()
        return max(content_end, len(transcript.rstrip())), None

    def _content_end(
        self, chat: AdaptedChat, index: int, transcript: str, start: int, has_special: bool
    ) -> int:
        """Return the position where a turn's content ends and the template's closing text begins.

        The message is rendered with a placeholder as its content. The text after it contains no special token
        of the message, and the transcript ends with the same text.
        """
        replaced = with_placeholders(chat.conversation.messages[index], self.special_pattern)
        rendered = chat.render(index, self.template.adapt(replaced))
        position = rendered.rfind(PLACEHOLDER)
        closing = rendered[position + len(PLACEHOLDER) :]
        if position >= 0 and transcript.endswith(closing):
            return max(start, len(transcript) - len(closing))
        if has_special:
            raise BadLine(
                f"messages[{index}] contains special tokens of the tokenizer, and the end of the turn cannot "
                "be found in what the chat template renders; remove the special tokens",
                "special tokens inside a turn",
            )
        return start

    def stop_after(
        self, chat: AdaptedChat, index: int, sequence: Rendering, end: int
    ) -> tuple[int, str | None]:
        """Find the stop token after a turn of a template without end-of-turn tokens (GLM-4).

        The model stops by generating the first token of the next header. If the sequence continues, that
        token follows the turn. After the last turn it is found by rendering one more turn, and stored in
        `sequence.stop_id`, with the text cut before it.

        Returns:
            The end of the turn, including the stop token if it is part of the text, and the stop token, if
            any.

        Raises:
            BadLine: the next turn is an assistant turn as well, so its header does not stop generation.
        """
        continues = bool(sequence.text[end:].strip())
        if continues and (match := self._stop_at(sequence.text, end)):
            return match.end(), match.group()
        following = chat.conversation.messages[index + 1 : index + 2]
        if continues and not (following and following[0]["role"] == "assistant"):
            return end, None
        extended = self._with_reply(chat, index, sequence.text[:end])
        match = self._stop_at(extended, end)
        if match is None:
            return end, None
        if continues:
            raise BadLine(
                f"messages[{index}] and messages[{index + 1}] are both assistant turns, and the chat "
                "template has no token that ends the first; join them, or pass a template that ends all "
                "turns (--chat_template)",
                "a turn without an end",
            )
        sequence.text, sequence.stop_id = extended[: match.start()], self.stops[match.group()]
        return match.start(), match.group()

    def _with_reply(self, chat: AdaptedChat, index: int, text: str) -> str:
        """Return `text`, which ends with a turn, followed by the header of a reply to that turn."""
        calls = chat.conversation.messages[index].get("tool_calls")
        reply = self.template.turn("tool" if calls else "user", ".")
        try:
            extended = chat.render(index + 1, reply)
            if extended.startswith(text):
                return extended
            # The reply makes the template drop the reasoning of this turn (GLM-4.5). The same header
            # follows a placeholder answer.
            extended = chat.render(index, self.template.turn("assistant", PLACEHOLDER), reply)
        except BadLine:
            return text
        return text + extended[extended.rfind(PLACEHOLDER) + len(PLACEHOLDER) :]

    def _stop_at(self, text: str, position: int) -> re.Match[str] | None:
        """Return the match of a stop token at a position, after any white space, if there is one."""
        blank = len(text[position:]) - len(text[position:].lstrip())
        match = self.special_pattern.match(text, position + blank)
        return match if match and match.group() in self.stops else None
