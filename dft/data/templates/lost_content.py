"""What a chat template leaves out: a line whose tools, calls, reasoning or content would be lost is bad.

A template drops without a word what it was not written for, and the model would be taught an answer that
lacks it. Whether a text gets through is asked with a placeholder, since short texts occur by chance.
"""

import json
from os.path import commonprefix

from dft.data.conversations.faults import BadLine
from dft.data.conversations.turns import REASONING_KEYS
from dft.data.templates.template import PLACEHOLDER, Chat, Message, reasoning_of

REMEDY = "pass a template that renders it (--chat_template)"
NO_CALLS = f"does not render its tool calls; write them into 'content', or {REMEDY}"
NO_REASONING = f"does not render its reasoning; put it into 'content', or {REMEDY}"
TAKES_REASONING = f"takes the reasoning in front of </think> out of 'content'; {REMEDY}"
NO_CONTENT = (
    f"does not render the 'content' of a turn that also calls tools or reasons; take it out, or {REMEDY}"
)
THINKS_ALREADY = (
    "ends the thinking in the prompt already, as with enable_thinking false, so the model would be taught "
    "reasoning that it never begins; take the reasoning out, or let the template think"
)
KINDS = {
    NO_CALLS: "tool calls are not rendered",
    NO_REASONING: "reasoning is not rendered",
    TAKES_REASONING: "reasoning is not rendered",
    NO_CONTENT: "content beside tool calls or reasoning is not rendered",
    THINKS_ALREADY: "reasoning behind a prompt that ends it",
}
CERTAIN = 24
"""Characters from which on a text is not found in a rendering by chance."""


def check_tools(chat: Chat, full: str) -> None:
    """Raises `BadLine` where definitions of tools change nothing in `full`, the rendering."""
    if chat.template.render(chat.messages, {**chat.context, "tools": None}) == full:
        raise BadLine(
            f"the chat template does not render 'tools'; put them into a system turn, or {REMEDY}",
            "tools are not rendered",
        )


def check_calls(chat: Chat) -> None:
    """Raises `BadLine` where a call is not rendered; for templates that do not render the call of a probe."""
    for index, message in enumerate(chat.conversation.messages):
        if not message.get("tool_calls"):
            continue
        calls = [
            {**call, "function": {**call["function"], "name": PLACEHOLDER}} for call in message["tool_calls"]
        ]
        asked = chat.template.suited({**message, "tool_calls": calls})
        if PLACEHOLDER not in chat.render(index, asked):
            raise left_out(index, NO_CALLS)


def check_thinking(chat: Chat, index: int, prompt: str, upto: str) -> None:
    """Raises `BadLine` for a turn with reasoning whose prompt closes an empty think block.

    Args:
        prompt: what the model gets at inference in front of the turn.
        upto: the rendering that ends with the turn.
    """
    shared = len(commonprefix([prompt, upto]))
    closed = "</think>" in prompt[shared:] and "</think>" in upto[shared:]
    if closed and thought_of(chat.conversation.messages[index]):
        raise left_out(index, THINKS_ALREADY)


def omission(chat: Chat, index: int, rendered: str, *following: Message) -> BadLine | None:
    """What of a turn's calls, reasoning and content its rendering lacks, as what is wrong with the line.

    Args:
        rendered: the turn as the template writes it.
        following: the messages behind it, where it was rendered with them.
    """
    message = chat.conversation.messages[index]
    content = message["content"]

    def survives(text: str, aside: str, asked: Message) -> bool:
        # Placed where a text is not found (a template may indent or escape it) or too short to be sure that
        # it is not another part of the turn, or the template's own words.
        if not text or (len(text) >= CERTAIN and text in rendered and text not in aside):
            return True
        return PLACEHOLDER in chat.render(index, chat.template.suited(asked), *following)

    if len(message) > 2:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in rendered and json.dumps(name, ensure_ascii=False)[1:-1] not in rendered:
                return left_out(index, NO_CALLS)
        reasoning = (reasoning_of(message) or "").strip()
        others = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        if not survives(reasoning, content, {**others, "reasoning_content": PLACEHOLDER}):
            return left_out(index, NO_REASONING)
        aside = f"{reasoning}{json.dumps(message.get('tool_calls'), ensure_ascii=False)}"
        if "</think>" not in content and not survives(
            content.strip(), aside, {**message, "content": PLACEHOLDER}
        ):
            return left_out(index, NO_CONTENT)
    before, closed, after = content.partition("</think>")
    head, opened, thought = before.rpartition("<think>")
    if closed and not survives(
        thought.strip(), head + after, {**message, "content": f"{head}{opened}{PLACEHOLDER}{closed}{after}"}
    ):
        return left_out(index, TAKES_REASONING)
    return None


def thought_of(message: Message) -> str:
    """A turn's reasoning, under a key of its own or in front of </think> in the content; "" without any."""
    thought, closed, _ = message["content"].partition("</think>")
    return (reasoning_of(message) or (thought.rpartition("<think>")[2] if closed else "")).strip()


def left_out(index: int, what: str) -> BadLine:
    return BadLine(f"messages[{index}]: the chat template {what}", KINDS[what])


def unread(role: str) -> BadLine:
    """What is wrong with every conversation under a template that leaves out what a role says."""
    return BadLine(
        f"the chat template does not render what the {role} says; {REMEDY}", "content is not rendered"
    )
