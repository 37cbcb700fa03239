"""Detect content that a chat template drops: tools, tool calls, reasoning or the text of a turn.

A template silently drops content it was not written for, and the model would be trained on answers without
it. Such conversations are rejected. Whether a text is rendered is tested with a placeholder in its place,
because short texts also occur in a rendering by chance.
"""

import json
from os.path import commonprefix

from dft.data.conversations.faults import BadLine
from dft.data.conversations.turns import REASONING_KEYS
from dft.data.templates.messages import PLACEHOLDER, Message, reasoning_field, reasoning_of
from dft.data.templates.template import AdaptedChat

REMEDY = "pass a template that renders it (--chat_template)"
NO_CALLS = f"does not render its tool calls; write them into 'content', or {REMEDY}"
NO_REASONING = f"does not render its reasoning; put it into 'content', or {REMEDY}"
REMOVES_REASONING = f"removes the reasoning before </think> from 'content'; {REMEDY}"
NO_CONTENT = (
    f"does not render the 'content' of a turn that also has tool calls or reasoning; remove it, or {REMEDY}"
)
PROMPT_CLOSES_THINKING = (
    "closes the thinking block in the prompt already, as with enable_thinking false, so the model would be "
    "trained on reasoning that it never starts; remove the reasoning, or let the template open the block"
)
KINDS = {
    NO_CALLS: "tool calls are not rendered",
    NO_REASONING: "reasoning is not rendered",
    REMOVES_REASONING: "reasoning is not rendered",
    NO_CONTENT: "content next to tool calls or reasoning is not rendered",
    PROMPT_CLOSES_THINKING: "reasoning after a prompt that closes it",
}
UNAMBIGUOUS_LENGTH = 24
"""Minimum length, in characters, of a text whose occurrence in a rendering is not a coincidence."""


def check_tools(chat: AdaptedChat, rendered: str) -> None:
    """Check that the tool definitions of a conversation change its rendering.

    Raises:
        BadLine: the rendering without tools is the same.
    """
    if chat.template.render(chat.messages, {**chat.context, "tools": None}) == rendered:
        raise BadLine(
            f"the chat template does not render 'tools'; put them into a system turn, or {REMEDY}",
            "tools are not rendered",
        )


def check_calls(chat: AdaptedChat) -> None:
    """Check that every tool call is rendered, for templates that do not render the probe's tool call.

    Raises:
        BadLine: a tool call is not rendered.
    """
    for index, message in enumerate(chat.conversation.messages):
        if not message.get("tool_calls"):
            continue
        calls = [
            {**call, "function": {**call["function"], "name": PLACEHOLDER}} for call in message["tool_calls"]
        ]
        probe = chat.template.adapt({**message, "tool_calls": calls})
        if PLACEHOLDER not in chat.render(index, probe):
            raise _lost(index, NO_CALLS)


def check_thinking(chat: AdaptedChat, index: int, prompt: str, transcript: str) -> None:
    """Check that the prompt of a turn with reasoning does not close the thinking block.

    Args:
        chat: the conversation.
        index: index of the turn.
        prompt: the prompt of the turn at inference.
        transcript: rendering of the conversation up to and including the turn.

    Raises:
        BadLine: the prompt closes the block before the turn begins.
    """
    shared = len(commonprefix([prompt, transcript]))
    is_closed = "</think>" in prompt[shared:] and "</think>" in transcript[shared:]
    if is_closed and reasoning_of(chat.conversation.messages[index]):
        raise _lost(index, PROMPT_CLOSES_THINKING)


def find_lost_content(chat: AdaptedChat, index: int, rendered: str, *following: Message) -> BadLine | None:
    """Return an error if tool calls, reasoning or content of a turn are missing in its rendering, else None.

    Args:
        chat: the conversation.
        index: index of the turn.
        rendered: the rendering of this turn only.
        following: adapted messages after the turn that `rendered` was made with.
    """
    message = chat.conversation.messages[index]
    content = message["content"]

    def is_rendered(text: str, other_text: str, probe: Message) -> bool:
        # A probe is needed if the text is not found (a template may indent or escape it), or if it could be
        # found by chance: in another part of the turn or in the template's own text.
        if not text:
            return True
        if len(text) >= UNAMBIGUOUS_LENGTH and text in rendered and text not in other_text:
            return True
        return PLACEHOLDER in chat.render(index, chat.template.adapt(probe), *following)

    if len(message) > 2:  # more than role and content
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in rendered and json.dumps(name, ensure_ascii=False)[1:-1] not in rendered:
                return _lost(index, NO_CALLS)
        reasoning = (reasoning_field(message) or "").strip()
        without_reasoning = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        if not is_rendered(reasoning, content, {**without_reasoning, "reasoning_content": PLACEHOLDER}):
            return _lost(index, NO_REASONING)
        other_text = f"{reasoning}{json.dumps(message.get('tool_calls'), ensure_ascii=False)}"
        if "</think>" not in content and not is_rendered(
            content.strip(), other_text, {**message, "content": PLACEHOLDER}
        ):
            return _lost(index, NO_CONTENT)
    before, closed, after = content.partition("</think>")
    head, opened, thought = before.rpartition("<think>")
    probe = {**message, "content": f"{head}{opened}{PLACEHOLDER}{closed}{after}"}
    if closed and not is_rendered(thought.strip(), head + after, probe):
        return _lost(index, REMOVES_REASONING)
    return None


def _lost(index: int, what: str) -> BadLine:
    return BadLine(f"messages[{index}]: the chat template {what}", KINDS[what])


def unrendered_role_error(role: str) -> BadLine:
    """Return the error for all conversations of a template that drops the content of a role."""
    return BadLine(
        f"the chat template does not render the content of {role} turns; {REMEDY}", "content is not rendered"
    )
