"""Completions of assistant turns: the text to generate, and the prompt before it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dft.data.conversations.faults import BadLine
from dft.data.templates.alignment import Aligner, Start, misaligned
from dft.data.templates.lost_content import PROMPT_CLOSES_THINKING, check_rendered, check_written, lost
from dft.data.templates.markers import Markers, compile_any
from dft.data.templates.messages import Message, reasoning_of
from dft.data.templates.probes import Probe, ProbeMaker
from dft.data.templates.template import AdaptedChat, ChatTemplate
from dft.data.templates.turn_ends import TurnEnd, TurnEnds, next_turns

MAX_FRAMES = 16
"""Number of frames to remember for each set of template variables."""
MAX_PROFILES = 256
"""Number of sets of template variables to remember."""
QUOTED = 30
"""Number of characters of a text that an error message quotes."""
NESTED_TEXT = 24
"""Minimum length, in characters, of a text whose occurrence in another text is not a coincidence."""


@dataclass(frozen=True)
class Completion:
    """An assistant turn as the model generates it.

    Attributes:
        prompt: the prompt at inference.
        text: what the model has to generate after it, including the end-of-turn token.
        ending: the end-of-turn token, None if the template has none.
        transcript: the rendering of the conversation up to and including the turn.
        start: index of the first character of `text` in `transcript`.
        prompt_only: end of the prompt that the transcript does not have before `start`.
        is_open: whether `prompt_only` opens a block, such as `<think>`, that the turn does not close.
        changes_space: whether the template changes white space inside of the turn's texts.
    """

    prompt: str
    text: str
    ending: str | None
    transcript: str
    start: int
    prompt_only: str = ""
    is_open: bool = False
    changes_space: bool = False


@dataclass(frozen=True)
class Frame:
    """Text of the template around the content of a turn, verified with placeholders.

    Attributes:
        opening: text between the prompt and the content.
        closing: text after the content.
        end: the end of the turn, in the closing text.
    """

    opening: str
    closing: str
    end: TurnEnd

    def completion(self, prompt: str, transcript: str, content: str) -> Completion | None:
        """Return the completion of a turn that consists of this frame and its content, else None."""
        start, length = len(prompt), len(transcript) - len(self.closing)
        if not (transcript.startswith(self.opening, start) and transcript.endswith(self.closing)):
            return None
        if transcript[start + len(self.opening) : length] != content:
            return None
        return Completion(prompt, transcript[start:length] + self.end.text, self.end.token, transcript, start)


@dataclass
class TemplateProfile:
    """Properties of a chat template for one set of variables.

    Attributes:
        ends: finds the ends of turns.
        maker: makes messages with placeholders.
        aligner: finds the starts of turns.
        frames: verified frames of plain turns, the latest first.
        contexts: shapes of conversations whose messages are all rendered.
    """

    ends: TurnEnds
    maker: ProbeMaker
    aligner: Aligner
    frames: list[Frame] = field(default_factory=list)
    contexts: set[str] = field(default_factory=set)


def is_plain(message: Message) -> bool:
    """Return whether a message is text only, without white space around it, which a template may remove."""
    content = message["content"]
    return len(message) == 2 and content == content.strip()


class CompletionFinder:
    """Finds and verifies the completions of assistant turns under one chat template.

    Args:
        template: the chat template.
        markers: special tokens and tags.
        stops: tokens at which generation stops.
    """

    def __init__(self, template: ChatTemplate, markers: Markers, stops: Iterable[str]) -> None:
        self.template = template
        self.markers = markers
        self.stops = frozenset(stops)
        self._profiles: dict[str, TemplateProfile] = {}

    def profile(self, chat: AdaptedChat) -> TemplateProfile:
        """Return the properties of the template for the variables of a conversation."""
        variables, tools = chat.conversation.variables, chat.conversation.tools
        # Some templates require tools, and some end turns differently if there are any.
        key = f"{json.dumps(variables, sort_keys=True) if variables else ''}{bool(tools)}"
        profile = self._profiles.get(key)
        if profile is None:
            context = self.template.context(variables, tools)
            ends = TurnEnds(self.template, self.markers, self.stops, context)
            structure = {text for text in self.markers.source_texts if text not in ends.tokens}
            maker = ProbeMaker(compile_any(structure), self.markers)
            profile = TemplateProfile(ends, maker, Aligner(self.template, self.markers, maker, context))
            if len(self._profiles) >= MAX_PROFILES:
                self._profiles.clear()
            self._profiles[key] = profile
        return profile

    def find(self, chat: AdaptedChat, index: int) -> Completion:
        """Return the completion of an assistant turn.

        Raises:
            BadLine: the template raises an error, drops part of the turn, or renders it so that its start or
                end is not clear.
        """
        profile = self.profile(chat)
        message = chat.conversation.messages[index]
        transcript = chat.render(index + 1)
        prompt = chat.render(index, prompt=True) if index else None
        if prompt is not None and is_plain(message) and transcript.startswith(prompt):
            for frame in profile.frames:
                completion = frame.completion(prompt, transcript, message["content"])
                if completion is not None and not self.markers.occur_in(message["content"]):
                    return completion
        return self._verify(chat, index, prompt, transcript)

    def _verify(self, chat: AdaptedChat, index: int, prompt: str | None, transcript: str) -> Completion:
        """Find a completion by comparing renderings that have placeholders in place of the turn's texts."""
        profile, message = self.profile(chat), chat.conversation.messages[index]
        place = chat.place(index)
        probe = profile.maker.probe(message)
        probed = chat.render(index, self.template.adapt(probe.message))
        first = probe.first(probed)
        if first < 0:
            check_rendered(place, message, probe, "")
            raise misaligned(place)
        if prompt is None:
            prompt, start = profile.aligner.first_start(chat, probed, probe)
        else:
            start = profile.aligner.start(chat, index, prompt, probed, probe)
        if prompt and index and reasoning_of(message) and self._closes_thinking(chat, index, prompt):
            raise lost(place, PROMPT_CLOSES_THINKING)
        check_rendered(place, message, probe, probed[start.position :])
        closing = probed[probe.end(probed) :]
        end = self._end(chat, index, probe, probed)
        self._check_own_text(chat, index, probe, probed[start.position : len(probed) - len(closing)])
        completion = self._locate(place, prompt, transcript, probed[:first], start, closing, end)
        if not check_written(place, message, probe, completion.text):
            completion = replace(completion, changes_space=True)
        if is_plain(message) and index and not start.prompt_only and message["content"] in transcript:
            profile.frames.insert(0, Frame(probed[start.position : first], closing, end))
            del profile.frames[MAX_FRAMES:]
        return completion

    def _closes_thinking(self, chat: AdaptedChat, index: int, prompt: str) -> bool:
        """Return whether the generation prompt of a turn ends with the end of a block, such as `</think>`."""
        base = chat.render(index)
        return self.markers.ends_closed(prompt[self.markers.shared_prefix(prompt, base) :])

    def _end(self, chat: AdaptedChat, index: int, probe: Probe, probed: str) -> TurnEnd:
        """Return the end of a turn, given its rendering with placeholders.

        Raises:
            BadLine: the turn has no end-of-turn token, although others do.
        """
        ends, closing = self.profile(chat).ends, probed[probe.end(probed) :]
        turn_end, has_following = None, False
        for turn in next_turns(chat, index):
            try:
                longer = chat.render(index, self.template.adapt(probe.message), turn)
            except BadLine:
                continue  # the template does not accept such a turn here
            end = probe.same_end(probed, longer)
            has_following = has_following or end >= 0
            turn_end = ends.find(closing, longer[end:]) if end >= 0 else None
            if turn_end is not None:
                return turn_end
        if not has_following:
            turn_end = ends.find(closing, None)
        if turn_end is None:
            plain = ends.plain
            assert plain is not None, "without a plain end, every turn has an end"
            raise BadLine(
                f"{chat.place(index)}: the chat template ends plain turns with {plain.token}, but writes "
                f"{closing.strip()[:QUOTED]!r} after this one, where generation would not stop; if it "
                "should stop there, add that token to eos_token_id in generation_config.json, otherwise pass "
                "another template (--chat_template) or remove the turn",
                "a turn without an end-of-turn token",
            )
        return turn_end

    def _check_own_text(self, chat: AdaptedChat, index: int, probe: Probe, written: str) -> None:
        """Check the text that the template writes into a turn.

        Args:
            chat: the conversation.
            index: index of the turn.
            probe: the turn with placeholders.
            written: the rendering of the turn from its start to its last placeholder.

        Raises:
            BadLine: it contains a token that ends turns, or text of another message.
        """
        token = self.profile(chat).ends.written_before(written)
        if token is not None:
            raise BadLine(
                f"{chat.place(index)}: the chat template writes {token}, at which generation stops, before "
                "the end of the turn, so the model would never generate what follows it; split the turn into "
                "several, or pass another template (--chat_template)",
                "text after the end-of-turn token",
            )
        others = [
            message["content"].strip() for at, message in enumerate(chat.conversation.messages) if at != index
        ]
        for text in others:
            if len(text) >= NESTED_TEXT and text in written:
                raise BadLine(
                    f"{chat.place(index)}: the chat template repeats text of another turn inside this "
                    "one; pass another template (--chat_template)",
                    "text of another turn inside a turn",
                )

    def _locate(
        self,
        place: str,
        prompt: str | None,
        transcript: str,
        before: str,
        start: Start,
        closing: str,
        end: TurnEnd,
    ) -> Completion:
        """Locate a turn in the rendering of the real conversation.

        Args:
            place: where the row has the turn, for error messages.
            prompt: its prompt at inference, None if there is none.
            transcript: the rendering up to and including the turn.
            before: the text before the first placeholder in the rendering with placeholders.
            start: the start of the turn in that rendering.
            closing: the text after its last placeholder.
            end: the end of the turn, in `closing`.

        Raises:
            BadLine: the two renderings differ outside of the turn's texts.
        """
        position, length = start.position, len(transcript) - len(closing)
        if not transcript.startswith(before[:position]):
            raise misaligned(place)
        if length >= position and transcript.endswith(closing):
            text = transcript[position:length] + end.text
        else:
            text = self._until_only_end(place, transcript, position, closing[len(end.text) :], end)
        is_open = self.markers.ends_open(start.prompt_only) and not any(
            self.markers.ends_closed(match.group()) for match in self.markers.pattern.finditer(text)
        )
        context = transcript[:position] if prompt is None else prompt
        return Completion(context, text, end.token, transcript, position, start.prompt_only, is_open)

    def _until_only_end(self, place: str, transcript: str, position: int, after: str, end: TurnEnd) -> str:
        """Return the text of a turn whose closing text depends on its content.

        Args:
            place: where the row has the turn, for the error message.
            transcript: the rendering up to and including the turn.
            position: the start of the turn.
            after: the text after the end of the turn, in a rendering with placeholders.
            end: the end of the turn.

        Raises:
            BadLine: the end-of-turn token does not occur exactly once.
        """
        stop = len(transcript) - len(after)
        token = end.token or ""
        text = transcript[position:stop]
        if (
            not token
            or end.is_next_header
            or text.count(token) != 1
            or not text.endswith(token)
            or transcript[stop:] != after
        ):
            raise BadLine(
                f"{place} contains special tokens of the tokenizer, and the end of the turn cannot "
                "be found in what the chat template renders; remove the special tokens",
                "special tokens inside a turn",
            )
        return text
