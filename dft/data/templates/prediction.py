"""Prediction of prompts and completions in long conversations, to render in linear time.

Rendering every prompt of a conversation takes quadratic time. In a long conversation, most turns are
predicted from the text around earlier ones and compared with one rendering of the whole conversation. Turns
at regular intervals are rendered and verified as in short conversations.
"""

from dft.data.templates.completion import Completion, CompletionFinder, is_plain
from dft.data.templates.template import AdaptedChat

ALWAYS_VERIFIED = 16
"""Number of supervised turns at the start and at the end of a conversation that are always rendered."""
VERIFIED_BETWEEN = 32
"""Approximate number of turns between these that are rendered as well."""


class TurnPredictor:
    """Predicts the completions of one conversation.

    Args:
        chat: the conversation.
        finder: finds and verifies completions.
    """

    def __init__(self, chat: AdaptedChat, finder: CompletionFinder) -> None:
        self.chat = chat
        self.finder = finder
        supervised = [
            index for index, is_supervised in enumerate(chat.conversation.supervised) if is_supervised
        ]
        middle = supervised[ALWAYS_VERIFIED:-ALWAYS_VERIFIED]
        interval = -(-len(middle) // VERIFIED_BETWEEN)
        self.predictable = {turn for number, turn in enumerate(middle) if interval > 1 and number % interval}
        self.whole = chat.render() if self.predictable else ""
        self._between: dict[tuple[str, ...], list[str]] = {}

    def learn(self, previous: int, index: int, added: str) -> None:
        """Note the text of the template around the messages between two turns of a sequence.

        Args:
            previous: index of the earlier turn.
            index: index of the later turn.
            added: what the prompt of the later turn adds to the sequence up to the earlier turn.
        """
        if not self.predictable:
            return
        texts = []
        for message in self.chat.conversation.messages[previous + 1 : index]:
            if not message["content"] or len(message) != 2:
                return
            before, content, added = added.partition(message["content"])
            if not content:
                return
            texts.append(before)
        self._between[self._roles(previous, index)] = [*texts, added]

    def predict(self, previous: int, index: int, sequence: str) -> Completion | None:
        """Return the completion of a turn, None if it must be rendered.

        Args:
            previous: index of the turn before it in the sequence.
            index: index of the turn.
            sequence: text of the sequence up to the earlier turn.
        """
        texts = self._between.get(self._roles(previous, index))
        message = self.chat.conversation.messages[index]
        if index not in self.predictable or texts is None or not is_plain(message):
            return None
        parts = [texts[0]]
        for between, text in zip(
            self.chat.conversation.messages[previous + 1 : index], texts[1:], strict=True
        ):
            if len(between) != 2 or self.finder.markers.occur_in(between["content"]):
                return None
            parts += [between["content"], text]
        if self.finder.markers.occur_in(message["content"]):
            return None
        prompt = "".join(parts)
        for frame in self.finder.profile(self.chat).frames:
            text = frame.opening + message["content"] + frame.end.text
            if self.whole.startswith(prompt + text, len(sequence)):
                return Completion(sequence + prompt, text, frame.end.token, "", 0)
        return None

    def _roles(self, previous: int, index: int) -> tuple[str, ...]:
        return tuple(message["role"] for message in self.chat.conversation.messages[previous + 1 : index])
