"""Renderer of conversations as training sequences, for any chat template.

The context of an assistant turn is its prompt at inference, the rendering of the messages before it with
`add_generation_prompt=True`. The supervised span after it is what the model has to generate, including the
token that ends the turn. A conversation is one sequence if each prompt begins with the previous prompt and
completion. Otherwise it unrolls into several sequences.
"""

from collections.abc import Iterable

from dft.data.conversations.conversation import Conversation
from dft.data.templates.completion import Completion, CompletionFinder
from dft.data.templates.context import ContextChecker
from dft.data.templates.generation_tags import GenerationTags
from dft.data.templates.lost_content import check_tools, unrendered_role_error
from dft.data.templates.markers import Markers, common_prefix_length
from dft.data.templates.prediction import TurnPredictor
from dft.data.templates.rendering import Rendering
from dft.data.templates.template import AdaptedChat, ChatTemplate

CHANGES_SPACE = "the chat template changes white space inside of an answer, which is trained as it renders it"
QUOTED = 40
"""Number of characters of a text that a reason quotes."""


class ConversationRenderer:
    """Renderer for one chat template that also finds the supervised spans.

    Args:
        template: the chat template.
        stops: the tokens that stop generation.
        added_tokens: all added tokens of the vocabulary.
        use_generation_tags: whether to supervise only what the {% generation %} blocks of the template mark.
    """

    def __init__(
        self,
        template: ChatTemplate,
        stops: Iterable[str],
        added_tokens: Iterable[str],
        use_generation_tags: bool = False,
    ) -> None:
        self.template = template
        self.stops = sorted(stops)
        self.use_generation_tags = use_generation_tags
        markers = Markers([*added_tokens, *self.stops], template.source)
        self.finder = CompletionFinder(template, markers, self.stops)

    def render(self, conversation: Conversation) -> list[Rendering]:
        """Return the training sequences of a conversation.

        Raises:
            BadLine: the template raises an error on these messages, drops part of their content, or renders
                a turn so that it is not clear what the model has to generate.
            LimitExceeded: the template exceeds a limit of `dft.data.sandbox.limits`.
        """
        if self.template.unrendered_role is not None:
            raise unrendered_role_error(self.template.unrendered_role)
        chat = AdaptedChat(self.template, conversation)
        predictor = TurnPredictor(chat, self.finder)
        try:
            return self._build(chat, predictor)
        except WrongPrediction:
            return self._build(chat, None)

    def _build(self, chat: AdaptedChat, predictor: TurnPredictor | None) -> list[Rendering]:
        """Return the sequences of a conversation, with or without predicted turns."""
        builder = SequenceBuilder(chat, self.finder, self.use_generation_tags, predictor)
        for index, is_supervised in enumerate(chat.conversation.supervised):
            if is_supervised:
                builder.add(index)
        return builder.finish()


class WrongPrediction(Exception):
    """Raised when the predicted turns of a conversation turn out to be wrong."""


class SequenceBuilder:
    """Joins the turns of one conversation to sequences.

    Args:
        chat: the conversation.
        finder: finds the completions of the turns.
        use_generation_tags: see `ConversationRenderer`.
        predictor: predicts turns of long conversations; None to render all of them.
    """

    def __init__(
        self,
        chat: AdaptedChat,
        finder: CompletionFinder,
        use_generation_tags: bool,
        predictor: TurnPredictor | None,
    ) -> None:
        self.chat = chat
        self.finder = finder
        has_tags = chat.template.compiled.has_generation_tags
        self.tags = GenerationTags(chat, use_generation_tags) if has_tags else None
        self.context = ContextChecker(finder.profile(chat), chat)
        self.sequences: list[Rendering] = []
        self.turns: list[int] = []
        self.transcript = ""
        self.prompt_length = 0
        self.predictor = None if has_tags else predictor
        self.has_predictions = False

    def add(self, index: int) -> None:
        """Add a supervised turn.

        Raises:
            WrongPrediction: a turn that was rendered does not continue a turn that was predicted.
        """
        sequence = self.sequences[-1] if self.sequences else None
        completion = self._predict(index)
        if completion is None:
            completion = self.finder.find(self.chat, index)
            self.context.check(index, completion.prompt)
        if sequence is not None and completion.prompt.startswith(sequence.text):
            if self.predictor is not None:
                self.predictor.learn(self.turns[-1], index, completion.prompt[len(sequence.text) :])
        else:
            if self.has_predictions:
                raise WrongPrediction
            self._complete()
            reason = ""
            if sequence is not None:
                reason = difference(self.finder.markers, sequence.text, completion.prompt)
            sequence = Rendering("", reason=reason)
            self.sequences.append(sequence)
            self.turns = []
        start, end = len(completion.prompt), len(completion.prompt) + len(completion.text)
        if self.tags is not None:
            start, end = self.tags.span(index, completion, sequence)
        sequence.text = completion.prompt + completion.text
        sequence.spans.append((start, end))
        sequence.endings.append(completion.ending if end == len(sequence.text) else None)
        sequence.weights.append(self.chat.conversation.weight(index))
        self._add_remarks(index, completion, sequence)
        self.turns.append(index)
        self.transcript = completion.transcript
        self.prompt_length = len(completion.prompt)

    def _predict(self, index: int) -> Completion | None:
        """Return the predicted completion of a turn, None if it must be rendered."""
        if self.predictor is None or not self.turns:
            return None
        completion = self.predictor.predict(self.turns[-1], index, self.sequences[-1].text)
        self.has_predictions = self.has_predictions or completion is not None
        return completion

    def _add_remarks(self, index: int, completion: Completion, sequence: Rendering) -> None:
        """Note properties of a turn that the user should know about."""
        if completion.changes_space:
            sequence.remarks[CHANGES_SPACE] = self.chat.place(index)
        if completion.is_open:
            kind = (
                f"the prompt of a turn without reasoning ends with {completion.prompt_only.strip()!r}, as at "
                "inference, so the model learns to answer inside of that block"
            )
            sequence.remarks[kind] = self.chat.place(index)

    def _complete(self) -> None:
        """Check that the current sequence has its tools, and add the text that follows its last turn."""
        if not self.turns:
            return
        chat, last = self.chat, self.turns[-1]
        if chat.conversation.tools and not chat.template.renders_tools:
            check_tools(chat, last, self.sequences[-1].text[: self.prompt_length])
        if self.transcript.startswith(self.sequences[-1].text):
            self.sequences[-1].text = self.transcript

    def finish(self) -> list[Rendering]:
        """Return the sequences of all turns that were added."""
        self._complete()
        if self.turns and self.turns[-1] + 1 < len(self.chat.messages):
            text = self.chat.render()
            if text.startswith(self.sequences[-1].text):
                self.sequences[-1].text = text
        return self.sequences


def difference(markers: Markers, before: str, after: str) -> str:
    """Return a sentence on how a text is rendered differently once the conversation continues."""
    position = common_prefix_length((before, after))
    start = markers.marker_start(before, max(0, position - QUOTED // 2))
    old, new = before[start : position + QUOTED], after[start : position + QUOTED]
    return f"the chat template renders {old!r} as {new!r} once the conversation continues"
