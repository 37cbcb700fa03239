"""Check that the prompt of a turn contains everything that the user wrote before it."""

from dft.data.conversations.faults import BadLine
from dft.data.templates.completion import NESTED_TEXT, TemplateProfile
from dft.data.templates.lost_content import CHANGES_TEXT, KINDS, NO_CALLS, REMEDY, is_written, lost
from dft.data.templates.messages import Message
from dft.data.templates.probes import CALL, CONTENT, Placeholder, Probe
from dft.data.templates.template import AdaptedChat

WRITTEN_ROLES = ("system", "developer", "user")
"""Roles whose text templates write as it is. Results of tools may be converted."""
LONG_CONVERSATION = 32
"""Number of messages from which on the texts are searched in the prompt first."""
MAX_SHAPES = 4096
"""Number of shapes of conversations to remember for each set of template variables."""


class ContextChecker:
    """Checks the prompts of one conversation.

    Args:
        profile: properties of the template for the variables of the conversation; remembers what was checked.
        chat: the conversation.
    """

    def __init__(self, profile: TemplateProfile, chat: AdaptedChat) -> None:
        self.profile = profile
        self.chat = chat
        self._shapes: list[str] = [str(bool(chat.conversation.tools))]

    def check(self, count: int, prompt: str) -> None:
        """Check that a prompt contains the texts of all its messages.

        Reasoning of earlier turns is not checked, since templates drop it at inference as well. The prompts
        of all turns must be checked: a text that a prompt lacks may be rendered only after the turn.

        Args:
            count: number of messages that the prompt consists of.
            prompt: the prompt.

        Raises:
            BadLine: a text is missing or changed.
        """
        messages = self.chat.conversation.messages[:count]
        if not messages or self._has_long_texts(messages, prompt):
            return
        for message in messages[len(self._shapes) - 1 :]:
            self._shapes.append(self._shape(message))
        shape = "\n".join(self._shapes[: count + 1])
        if shape not in self.profile.contexts:
            self._check_placeholders(count)
            if len(self.profile.contexts) >= MAX_SHAPES:
                self.profile.contexts.clear()
            self.profile.contexts.add(shape)
        for index, message in enumerate(messages):
            if message["role"] in WRITTEN_ROLES and not is_written(message["content"], prompt):
                raise lost(self.chat.place(index), CHANGES_TEXT)

    def _has_long_texts(self, messages: list[Message], prompt: str) -> bool:
        """Return whether a long prompt contains all texts in order, each of them too long for a coincidence.

        The shapes of long conversations are hardly ever equal, so remembering them would save nothing.
        """
        if len(messages) < LONG_CONVERSATION:
            return False
        position = 0
        for message in messages:
            text = message["content"].strip()
            if len(message) != 2 or len(text) < NESTED_TEXT or self.profile.maker.markers.occur_in(text):
                return False
            position = prompt.find(text, position)
            if position < 0:
                return False
            position += len(text)
        return True

    def _shape(self, message: Message) -> str:
        """Return a text that is equal for messages that a template treats alike."""
        if len(message) == 2 and not self.profile.maker.markers.occur_in(message["content"]):
            return str(message["role"])  # the most common case
        return self.profile.maker.shape(message)

    def _check_placeholders(self, count: int) -> None:
        """Check that a prompt with placeholders in place of all texts has the placeholders."""
        chat = self.chat
        messages = chat.conversation.messages[:count]
        probes = [self.profile.maker.probe(message, number) for number, message in enumerate(messages)]
        adapted = [chat.template.adapt(probe.message) for probe in probes]
        try:
            rendered = chat.template.render(adapted, chat.context, True)
        except BadLine:
            rendered = ""  # placeholders are not accepted in all messages, so they are tried one by one
        for index, probe in enumerate(probes):
            for placeholder in _required(messages[index], probe):
                is_rendered = placeholder.text in rendered
                if not is_rendered and not _is_rendered_alone(chat, index, count, probe, placeholder):
                    raise _not_rendered(chat, index, count, placeholder)


def _required(message: Message, probe: Probe) -> list[Placeholder]:
    """Return the placeholders that must be rendered."""
    required = [item for item in probe.placeholders if item.kind in (CONTENT, CALL)]
    if message["role"] != "assistant":
        return required
    texts = [item for item in required if item.kind == CONTENT]
    # Everything before the last tag of an earlier turn may be reasoning.
    optional = texts[:-1] if texts and not texts[-1].before else texts
    return [item for item in required if item not in optional]


def _is_rendered_alone(
    chat: AdaptedChat, index: int, count: int, probe: Probe, placeholder: Placeholder
) -> bool:
    """Return whether a placeholder is rendered if all other messages are the real ones."""
    adapted = [*chat.messages[:index], chat.template.adapt(probe.message), *chat.messages[index + 1 : count]]
    try:
        return placeholder.text in chat.template.render(adapted, chat.context, True)
    except BadLine:
        content = chat.conversation.messages[index]["content"].strip()
        return placeholder.kind == CONTENT and content in chat.render(count, prompt=True)


def _not_rendered(chat: AdaptedChat, index: int, count: int, placeholder: Placeholder) -> BadLine:
    """Return the error for a message that the prompt of a later turn lacks."""
    place, role = chat.place(index), chat.messages[index]["role"]
    if placeholder.kind == CALL:
        return BadLine(f"{place}: the chat template {NO_CALLS}", KINDS[NO_CALLS])
    return BadLine(
        f"{place}: the chat template does not render the text of this {role} turn, or only part of it, in "
        f"the prompt of {chat.place(count)}; remove it, write it into another turn, or {REMEDY}",
        f"{role} turn is not rendered",
    )
