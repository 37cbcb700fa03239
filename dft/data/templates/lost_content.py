"""Errors for content that a chat template drops: tools, tool calls, reasoning or text.

A template silently drops content it was not written for, and the model would be trained without it. Such
conversations are rejected. Whether a text is rendered is tested with a placeholder in its place, because
short texts also occur in a rendering by chance.
"""

import json

from dft.data.conversations.faults import BadLine
from dft.data.templates.messages import Message, reasoning_field
from dft.data.templates.probes import CALL, REASONING, Placeholder, Probe
from dft.data.templates.template import AdaptedChat

REMEDY = "pass a template that renders it (--chat_template)"
NO_CALLS = f"does not render its tool calls; write them into 'content', or {REMEDY}"
NO_REASONING = f"does not render its reasoning; put it into 'content', or {REMEDY}"
REMOVES_REASONING = f"removes the reasoning before </think> from 'content'; {REMEDY}"
NO_CONTENT = (
    f"does not render the 'content' of a turn that also has tool calls or reasoning; remove it, or {REMEDY}"
)
REMOVES_CONTENT = f"removes part of the 'content'; change it, or {REMEDY}"
CHANGES_TEXT = f"changes the text of this turn; change what the template treats specially, or {REMEDY}"
PROMPT_CLOSES_THINKING = (
    "closes the thinking block in the prompt already, as with enable_thinking false, so the model would be "
    "trained on reasoning that it never starts; remove the reasoning, or let the template open the block "
    "(with many templates by --chat_template_kwargs '{\"enable_thinking\": true}')"
)
KINDS = {
    NO_CALLS: "tool calls are not rendered",
    NO_REASONING: "reasoning is not rendered",
    REMOVES_REASONING: "reasoning is not rendered",
    NO_CONTENT: "content next to tool calls or reasoning is not rendered",
    REMOVES_CONTENT: "part of the content is not rendered",
    CHANGES_TEXT: "the text is changed",
    PROMPT_CLOSES_THINKING: "reasoning after a prompt that closes it",
}


def check_tools(chat: AdaptedChat, count: int, prompt: str) -> None:
    """Check that the tool definitions of a conversation change a prompt.

    Args:
        chat: the conversation.
        count: number of messages that the prompt consists of.
        prompt: the prompt.

    Raises:
        BadLine: the prompt without tools is the same.
    """
    without = chat.template.render(chat.messages[:count], {**chat.context, "tools": None}, True)
    if without == prompt:
        raise BadLine(
            f"the chat template does not render 'tools'; put them into a system turn, or {REMEDY}",
            "tools are not rendered",
        )


def check_rendered(place: str, message: Message, probe: Probe, rendered: str) -> None:
    """Check that the rendering of a turn contains all its placeholders.

    Args:
        place: where the row has the turn, for the error message.
        message: the turn.
        probe: the turn with placeholders.
        rendered: the rendering of `probe`, from the start of the turn.

    Raises:
        BadLine: a placeholder is missing.
    """
    for placeholder, position in zip(probe.placeholders, probe.positions(rendered), strict=True):
        if position < 0:
            raise lost(place, _reason(message, placeholder))


def check_written(place: str, message: Message, probe: Probe, text: str) -> bool:
    """Check that a completion contains the content, the reasoning and the arguments of its turn unchanged.

    Placeholders show what a template does to any text, but not what it does to special ones.

    Args:
        place: where the row has the turn, for the error message.
        message: the turn.
        probe: the turn with placeholders.
        text: the completion.

    Returns:
        Whether their white space is unchanged as well.

    Raises:
        BadLine: a text is missing.
    """
    for call in message.get("tool_calls", ()):
        # Placeholders stand for strings only, and a template may leave out an argument that is null.
        if not all(is_written(name, text) for name in call["function"]["arguments"]):
            raise lost(place, NO_CALLS)
    is_exact = True
    for placeholder in probe.placeholders:
        if placeholder.kind == CALL:
            continue
        if not is_written(placeholder.original, text):
            raise lost(place, _reason(message, placeholder))
        is_exact = is_exact and placeholder.original in text
    return is_exact


def is_written(text: str, rendered: str) -> bool:
    """Return whether a rendering contains a text, apart from white space and the escapes of JSON."""
    text = text.strip()
    if text in rendered:
        return True
    variants = [json.dumps(text, ensure_ascii=ensure_ascii)[1:-1] for ensure_ascii in (False, True)]
    return any(variant in rendered for variant in variants) or _letters(text) in _letters(rendered)


def _letters(text: str) -> str:
    return "".join(text.split())


def _reason(message: Message, placeholder: Placeholder) -> str:
    """Return the reason for a placeholder that is not rendered."""
    if placeholder.kind == CALL:
        return NO_CALLS
    if placeholder.kind == REASONING:
        return NO_REASONING
    if placeholder.before == "</think>":
        return REMOVES_REASONING
    has_more = bool(message.get("tool_calls")) or reasoning_field(message) is not None
    return NO_CONTENT if has_more else REMOVES_CONTENT


def lost(place: str, reason: str) -> BadLine:
    """Return the error for a turn of which something is not rendered; `reason` is a key of `KINDS`."""
    return BadLine(f"{place}: the chat template {reason}", KINDS[reason])


def unrendered_role_error(role: str) -> BadLine:
    """Return the error for all conversations of a template that drops the content of a role."""
    return BadLine(
        f"the chat template does not render the content of {role} turns; {REMEDY}", "content is not rendered"
    )
