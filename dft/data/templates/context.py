"""Check that the prompt of a turn contains everything that the user wrote before it."""

from collections.abc import Sequence

from dft.data.conversations.faults import BadLine
from dft.data.templates.completion import NESTED_TEXT, TemplateProfile
from dft.data.templates.lost_content import KINDS, NO_CALLS, REMEDY
from dft.data.templates.messages import Message
from dft.data.templates.probes import CALL, CONTENT, Placeholder, Probe
from dft.data.templates.template import AdaptedChat

LONG_CONVERSATION = 32
"""Number of messages from which on the texts are searched in the prompt first."""
MAX_SHAPES = 4096
"""Number of shapes of conversations to remember for each set of template variables."""


def check_context(
    profile: TemplateProfile, chat: AdaptedChat, count: int, supervised: Sequence[int], prompt: str
) -> None:
    """Check that the prompt of a turn contains the texts of all its messages, in their order.

    Reasoning of earlier turns is not checked, since templates drop it at inference as well.

    Args:
        profile: properties of the template for the variables of the conversation; remembers what was checked.
        chat: the conversation.
        count: number of messages that the prompt consists of.
        supervised: indices of the supervised turns among them in the same sequence.
        prompt: the prompt.

    Raises:
        BadLine: a text is missing.
    """
    messages = chat.conversation.messages[:count]
    if not messages or _has_all_texts(profile, messages, prompt):
        return
    shape = "\n".join([_shape(profile, message) for message in messages])
    shape = f"{shape}\n{bool(chat.conversation.tools)}{list(supervised)}"
    if shape in profile.contexts:
        return
    probes = [profile.maker.probe(message, number) for number, message in enumerate(messages)]
    try:
        rendered = chat.template.render(
            [chat.template.adapt(probe.message) for probe in probes], chat.context, True
        )
    except BadLine:
        rendered = ""  # the template does not accept these placeholders, so the messages are tried one by one
    for index, probe in enumerate(probes):
        for placeholder in _required(messages[index], probe):
            is_rendered = placeholder.text in rendered
            if not is_rendered and not _is_rendered_alone(chat, index, count, probe, placeholder):
                raise _not_rendered(chat.place(index), messages[index], placeholder)
    _check_order(chat, probes, supervised, rendered)
    if len(profile.contexts) >= MAX_SHAPES:
        profile.contexts.clear()
    profile.contexts.add(shape)


def _has_all_texts(profile: TemplateProfile, messages: Sequence[Message], prompt: str) -> bool:
    """Return whether a long prompt contains all texts in order, each of them too long for a coincidence.

    The shapes of long conversations are hardly ever equal, so remembering them would save nothing.
    """
    if len(messages) < LONG_CONVERSATION:
        return False
    position = 0
    for message in messages:
        text = message["content"].strip()
        if len(message) != 2 or len(text) < NESTED_TEXT or profile.maker.markers.occur_in(text):
            return False
        position = prompt.find(text, position)
        if position < 0:
            return False
        position += len(text)
    return True


def _shape(profile: TemplateProfile, message: Message) -> str:
    """Return a text that is equal for messages that a template treats alike."""
    if len(message) == 2 and not profile.maker.markers.occur_in(message["content"]):
        return str(message["role"])  # the most common case
    return profile.maker.shape(message)


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


def _check_order(
    chat: AdaptedChat, probes: Sequence[Probe], supervised: Sequence[int], rendered: str
) -> None:
    """Check that no message of the context of a supervised turn is rendered after the turn."""
    last_end = 0
    ends = []
    for message, probe in zip(chat.conversation.messages, probes, strict=False):
        if message["role"] != "assistant":
            last_end = max(last_end, probe.end(rendered))
        ends.append(last_end)
    for turn in supervised:
        first = probes[turn].first(rendered)
        if 0 <= first < ends[turn]:
            raise BadLine(
                f"{chat.place(turn)}: the chat template renders an earlier message after this turn; "
                "pass another template (--chat_template)",
                "a message is rendered after its answer",
            )


def _not_rendered(place: str, message: Message, placeholder: Placeholder) -> BadLine:
    """Return the error for a message that the prompt lacks."""
    if placeholder.kind == CALL:
        return BadLine(f"{place}: the chat template {NO_CALLS}", KINDS[NO_CALLS])
    role = message["role"]
    return BadLine(
        f"{place}: the chat template does not render the text of this {role} turn, or only part of "
        f"it; remove it, write it into another turn, or {REMEDY}",
        f"{role} turn is not rendered",
    )
