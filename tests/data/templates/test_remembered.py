"""The sequences of a conversation do not depend on the conversations encoded before it."""

import random

import pytest

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from tests.data.templates.chat_templates import FAMILIES, call, encoder_for, plain, talk, turn
from tests.data.templates.test_selfcheck import random_conversation

PLAIN = ["Two is four", "What? " * 6, " edges ", "a\n\nb", "<think>hm</think>so", "x<|im_end|>y", "日本"]


def conversation(generator: random.Random) -> Conversation:
    """Return a conversation with or without system turn, reasoning, calls and unsupervised turns."""
    if generator.random() < 0.3:
        return random_conversation(generator)
    messages = [turn("system", generator.choice(PLAIN))] if generator.random() < 0.4 else []
    for _ in range(generator.randint(1, 3)):
        messages.append(turn("user", generator.choice(PLAIN)))
        kind = generator.random()
        if kind < 0.2:
            messages.append(turn("assistant", tool_calls=[call("f", {"x": generator.choice(PLAIN)})]))
            messages.append(turn("tool", generator.choice(PLAIN)))
        reasoning = {"reasoning_content": generator.choice(PLAIN)} if 0.2 < kind < 0.4 else {}
        messages.append(turn("assistant", generator.choice(PLAIN), **reasoning))
    supervised = [generator.random() < 0.8 and message["role"] == "assistant" for message in messages]
    supervised[-1] = True
    return talk(messages, supervised)


def result(encoder: ChatEncoder, conversation: Conversation) -> str | list[tuple[list[int], list[int]]]:
    (group,) = encoder.encode([conversation])
    return str(group) if isinstance(group, BadLine) else [plain(example) for example in group]


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_conversations_does_not_matter(tokenizer_json, family):
    generator = random.Random(family)
    conversations = [conversation(generator) for _ in range(40)]
    variables = {"date_string": "1 May"}
    encoder = encoder_for(tokenizer_json, family, variables)
    forward = [result(encoder, item) for item in conversations]
    encoder = encoder_for(tokenizer_json, family, variables)
    backward = [result(encoder, item) for item in reversed(conversations)]
    assert forward == backward[::-1]
    for item, expected in list(zip(conversations, forward, strict=True))[::8]:
        assert result(encoder_for(tokenizer_json, family, variables), item) == expected
