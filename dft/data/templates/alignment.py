"""Where a turn begins in the rendering of a conversation, compared with its prompt at inference."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dft.data.conversations.faults import BadLine
from dft.data.templates.markers import Markers
from dft.data.templates.messages import PLACEHOLDER
from dft.data.templates.probes import Probe, ProbeMaker
from dft.data.templates.template import AdaptedChat, ChatTemplate

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Start:
    """Start of a turn in a rendering that ends with the turn.

    Attributes:
        position: index of the first character that the model has to generate.
        prompt_only: end of the prompt that the rendering does not have there, for example an opened think
            block; "" if the rendering continues the prompt.
    """

    position: int
    prompt_only: str = ""


class Aligner:
    """Finds the starts of turns under one chat template, for one set of variables.

    Args:
        template: the chat template.
        markers: special tokens and tags.
        maker: makes messages with placeholders.
        context: everything besides the messages that is needed to render a conversation.

    Attributes:
        header: the part of the generation prompt that the rendering of an answer begins with too, "" if the
            template has no generation prompt.
        between: the text between the texts of a question and of the answer to it that the model does not
            generate.
    """

    def __init__(
        self, template: ChatTemplate, markers: Markers, maker: ProbeMaker, context: Mapping[str, Any]
    ) -> None:
        self.template = template
        self.markers = markers
        self.maker = maker
        self.header = self.between = ""
        question = [*template.opening(context), template.turn("user", PLACEHOLDER)]
        try:
            prompt = template.render(question, context, True)
            base = template.render(question, context)
            answered = template.render([*question, template.turn("assistant", PLACEHOLDER)], context)
        except BadLine:
            return  # the template expects another kind of conversation
        before = answered[: answered.rfind(PLACEHOLDER)]
        if prompt.count(PLACEHOLDER) == base.count(PLACEHOLDER) == before.count(PLACEHOLDER) == 1:
            prompt, base, before = (text.partition(PLACEHOLDER)[2] for text in (prompt, base, before))
            self.header = prompt[markers.shared_prefix(prompt, base) :]
            position, prompt_only = self._align(prompt, self.header, before) or (0, prompt)
            self.header = self.header[: max(0, len(self.header) - len(prompt_only))]
            self.between = before[:position]

    def start(self, chat: AdaptedChat, index: int, prompt: str, probed: str, probe: Probe) -> Start:
        """Return the start of a turn that is not the first message, in a rendering with placeholders.

        Args:
            chat: the conversation.
            index: index of the turn.
            prompt: its prompt at inference.
            probed: the rendering up to and including the turn, with placeholders as the texts of the turn.
            probe: the turn with these placeholders; at least one of them is in `probed`.

        Raises:
            BadLine: the prompt and the rendering of the turn have different headers.
        """
        first = probe.first(probed)
        if len(prompt) <= first and probed.startswith(prompt):
            self._check_header(chat, index, probed[len(prompt) : first], prompt)
            return Start(len(prompt))
        prompt_end, base_end, opening = self._after_previous(chat, index, probe)
        header = prompt_end[self.markers.shared_prefix(prompt_end, base_end) :]
        aligned = self._align(prompt_end, header, opening)
        if aligned is None or not prompt.endswith(prompt_end):
            raise misaligned(chat.place(index))
        position, prompt_only = aligned
        if not probed.endswith(opening[position:], 0, first):
            raise misaligned(chat.place(index))
        return Start(first - len(opening) + position, prompt_only)

    def _align(self, prompt: str, header: str, opening: str) -> tuple[int, str] | None:
        """Return where a turn begins in a text that starts at the same place as the end of its prompt.

        Args:
            prompt: the end of the prompt.
            header: the part of it that is the generation prompt.
            opening: the text before the turn's own text.

        Returns:
            The position in `opening` and the end of the prompt that `opening` lacks, None if there is no
            common header.
        """
        shared = self.markers.shared_prefix(prompt, opening)
        position, size = self._header_end(header, opening)
        # The prompt may have more text before the header than the rendering of the turn.
        suffix = common_header(prompt, opening)
        for end, prompt_only in (
            (shared, prompt[shared:]),
            (position, header[size:]),
            (suffix, ""),
        ):
            end, prompt_only = self._after_last_shared(prompt_only, opening, end)
            covers_header = not header or (end > 0 and len(prompt_only) < len(header))
            if covers_header and self._is_boundary(prompt_only, opening[end:]):
                return end, prompt_only
        return None

    def _is_boundary(self, prompt_only: str, opening: str) -> bool:
        """Return whether a prompt and the rendering of a turn may differ like this after their header.

        Args:
            prompt_only: the end of the prompt, for example an opened think block.
            opening: the text that the rendering has instead.
        """
        if prompt_only and opening[:1].isalnum():
            return False  # inside of a word
        repeated, written = (
            {match.group() for match in self.markers.pattern.finditer(text)}
            for text in (prompt_only, opening)
        )
        return not repeated & written

    def _after_last_shared(self, prompt_only: str, opening: str, position: int) -> tuple[int, str]:
        """Move the start of a turn behind the last marker of the prompt that the rendering has as well.

        Args:
            prompt_only: the end of the prompt, from where the two differ.
            opening: the text before the turn's own text.
            position: where the two differ in `opening`.

        Returns:
            The new position and the end of the prompt from there.
        """
        for match in reversed([*self.markers.pattern.finditer(prompt_only)]):
            start = opening.find(match.group(), position)
            if start >= 0:
                start += len(match.group())
                shared = self.markers.shared_prefix(prompt_only[match.end() :], opening[start:])
                return start + shared, prompt_only[match.end() + shared :]
        return position, prompt_only

    def first_start(self, chat: AdaptedChat, probed: str, probe: Probe) -> tuple[str | None, Start]:
        """Return the start of a turn that is the first message.

        There is no inference without a message, so templates may fail on an empty conversation, or render it
        without a header. Then everything before the turn's own text is its context.

        Args:
            chat: the conversation.
            probed: the rendering of the turn, with placeholders as the texts of the turn.
            probe: the turn with these placeholders; at least one of them is in `probed`.

        Returns:
            The prompt at inference, None if there is none, and the start.

        Raises:
            BadLine: the turn has no header, although others do.
        """
        before = probed[: probe.first(probed)]
        try:
            prompt = chat.render(0, prompt=True)
        except BadLine:
            prompt = ""
        if self.header and self.header in prompt and before.startswith(prompt):
            return prompt, Start(len(prompt))
        end = self._last_header_end(self.between, before)
        has_header = self.header or WORD.search(self.markers.pattern.sub("", self.between))
        if not end and has_header:
            raise misaligned(chat.place(0))
        # Without a header, white space before the turn's own text is generated, as in later turns.
        return None, Start(end or len(before.rstrip()))

    def _check_header(self, chat: AdaptedChat, index: int, opening: str, prompt: str) -> None:
        """Check that the header is part of the prompt, if the template has a generation prompt."""
        if self.header and opening.startswith(self.header) and not prompt.endswith(self.header):
            raise BadLine(
                f"{chat.place(index)}: the chat template adds no generation prompt after "
                f"{chat.place(index - 1)}, so the model would have to generate the header of its own "
                "turn; remove the turn, or pass another template (--chat_template)",
                "no generation prompt",
            )

    def _after_previous(self, chat: AdaptedChat, index: int, probe: Probe) -> tuple[str, str, str]:
        """Render with placeholders in the message before the turn, and return what follows the last of them.

        The history may be rendered differently once it continues, but between the previous message and the
        turn the renderings are alike.

        Returns:
            The text that follows in the prompt, in the prompt without the generation prompt, and in the
            rendering of the turn up to its first placeholder.

        Raises:
            BadLine: the previous message has no text, or the renderings do not have it.
        """
        previous = self.maker.probe(chat.conversation.messages[index - 1], number=1)
        before = [*chat.messages[: index - 1], self.template.adapt(previous.message)]
        turn = self.template.adapt(probe.message)
        try:
            prompt = self.template.render(before, chat.context, True)
            base = self.template.render(before, chat.context)
            answered = self.template.render([*before, turn], chat.context)
        except BadLine:  # the template accepts the message itself, but not placeholders in it
            raise misaligned(chat.place(index)) from None
        first = probe.first(answered)
        texts = [item.text for item in previous.placeholders]
        texts = [text for text in texts if text in prompt and text in base and text in answered]
        if not texts or first < 0:
            raise misaligned(chat.place(index))
        last = max(texts, key=prompt.rfind)
        prompt, base, answered = (text.rpartition(last)[2] for text in (prompt, base, answered[:first]))
        return prompt, base, answered

    def _header_ends(self, header: str) -> list[int]:
        """Return where a header may end: at its own end, or before the tags of an opened think block."""
        cuts = [match.start() for match in self.markers.pattern.finditer(header)]
        without_words = [
            cut for cut in cuts if cut and not WORD.search(self.markers.pattern.sub("", header[cut:]))
        ]
        return [len(header), *reversed(without_words)]

    def _header_end(self, header: str, text: str) -> tuple[int, int]:
        """Return where the last header in a text ends, and how much of the header it is.

        Returns:
            The position in the text and that in the header, (0, 0) if the text does not have the header.
        """
        for end in self._header_ends(header):
            position = text.rfind(header[:end])
            if end and position >= 0:
                return position + end, end
        return 0, 0

    def _last_header_end(self, between: str, before: str) -> int:
        """Return where the header of a first turn ends, 0 if it has none.

        Args:
            between: the text before later turns, from the end of the previous message.
            before: the text before the first turn's own text.
        """
        for end in self._header_ends(between):
            words = [match.start() for match in self.markers.pattern.finditer(between[:end])]
            words += [match.start() for match in WORD.finditer(between[:end])]
            for start in range(max(words, default=-1) + 1):
                position = before.rfind(between[start:end])
                if position >= 0:
                    return position + end - start
        return 0


def common_header(prompt: str, opening: str) -> int:
    """Return the length of the longest text that ends a prompt and begins the rendering of a turn.

    White space alone does not count.
    """
    for size in range(min(len(prompt), len(opening)), 0, -1):
        if prompt.endswith(opening[:size]) and opening[:size].strip():
            return size
    return 0


def misaligned(place: str) -> BadLine:
    """Return the error for a turn whose start cannot be found."""
    return BadLine(
        f"{place}: the chat template renders the turn behind another header than the generation "
        "prompt, so it is not clear what the model has to generate; pass another template (--chat_template)",
        "another header than in the prompt",
    )
