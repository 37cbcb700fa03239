"""Properties of conversations that are no errors, but that a person should know about.

They are computed while a conversation is encoded and counted by `dft.data.preparing.quality`.
"""

import re
from collections.abc import Mapping, Sequence
from enum import IntFlag
from hashlib import blake2b
from typing import Any

import numpy as np

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.turns import REASONING_KEYS, SYSTEM_ROLES
from dft.data.templates.encoder import Example
from dft.data.templates.markers import Markers
from dft.labels import IGNORE_INDEX

SHINGLE = 16
"""Bytes of the overlapping pieces of text by which conversations are compared, a power of 2."""
HASHES = 16
MAX_COMPARED = 4096
"""Characters of a conversation that are compared, to bound the time."""
TRAITS_DTYPE = np.dtype(
    [
        ("flags", "u1"),
        ("script", "u1"),
        ("answer", "u8"),
        ("answer_tokens", "i4"),
        ("answer_characters", "i4"),
        ("signature", "u4", (HASHES,)),
    ]
)
"""Traits of a conversation.

flags: the `Flag`s that hold.
script: index into `SCRIPTS` of the script of the last answer; 0 if it has no letters.
answer: digest of the text of the last answer.
answer_tokens, answer_characters: its length, without the token that ends the turn.
signature: minima of hashes of the shingles. Of two conversations, the share of equal entries estimates the
    share of common shingles.
"""


class Flag(IntFlag):
    """A property of a conversation."""

    SYSTEM_PROMPT = 1
    EMPTY_REASONING = 2
    MARKERS = 4
    REFUSAL = 8
    OTHER_SCRIPT = 16
    NO_QUESTION = 32


SCRIPTS = {
    "none": None,
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "Chinese": re.compile(r"[\u4e00-\u9fff]"),
    "Japanese": re.compile(r"[\u3040-\u30ff]"),
    "Korean": re.compile(r"[\uac00-\ud7af]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
}
"""Letters of each script."""
SCRIPT_SAMPLE = 400
"""Number of characters at the beginning of a text that determine its script."""
EMPTY_THINK = re.compile(r"<think>\s*</think>")
REFUSAL = re.compile(
    r"as an ai (?:language )?model|i'?m sorry,? (?:but )?i (?:can(?:no|')t|am (?:unable|not able))"
    r"|i (?:cannot|can't|am unable to) (?:assist|help|fulfill|comply)"
    r"|作为一个?(?:人工智能|ai)|(?:抱歉|对不起)[,，]?\s*我(?:无法|不能)"
)
REFUSAL_SAMPLE = 300
"""Number of characters at the beginning of an answer that are searched for a refusal."""
REFUSAL_HINTS = ("as an ai", "i'm sorry", "im sorry", "i can", "i am unable", "作为", "抱歉", "对不起")
"""Texts of which every refusal contains at least one. Searching them first is faster."""
LETTER = re.compile("[A-Za-z]")
_GENERATOR = np.random.default_rng(0)
PIECE_FACTOR = np.uint32(0x9E3779B1)
HASH_FACTORS = _GENERATOR.integers(1, 2**32, HASHES, dtype=np.uint32) | np.uint32(1)


def traits_of(conversations: Sequence[tuple[Conversation, list[Example]]], markers: Markers) -> np.ndarray:
    """Return the traits of conversations, (conversations,) `TRAITS_DTYPE`.

    Args:
        conversations: each with its sequences before truncation.
        markers: the special tokens.
    """
    traits = np.zeros(len(conversations), dtype=TRAITS_DTYPE)
    if not conversations:
        return traits
    columns = [_single_traits(conversation, markers) for conversation, _ in conversations]
    names = ("flags", "script", "answer", "answer_characters")
    for name, values in zip(names, zip(*columns, strict=True), strict=True):
        traits[name] = values
    traits["answer_tokens"] = [_answer_tokens(examples[-1].labels) for _, examples in conversations]
    traits["signature"] = signatures([_compared_text(conversation) for conversation, _ in conversations])
    return traits


def _single_traits(conversation: Conversation, markers: Markers) -> tuple[int, int, int, int]:
    answer = _last_answer(conversation)
    script = _script(answer)
    flags = flags_of(conversation, markers, script)
    digest = blake2b(answer.encode(errors="replace"), digest_size=8).digest()
    return flags, script, int.from_bytes(digest, "little"), len(answer)


def flags_of(conversation: Conversation, markers: Markers, script: int | None = None) -> int:
    """Return the `Flag`s of a conversation.

    Args:
        conversation: the conversation.
        markers: the special tokens.
        script: the index in `SCRIPTS` of the script of its last answer, None to compute it.
    """
    messages = conversation.messages
    answers = [message for message in messages if message["role"] == "assistant"]
    answer = answers[-1]["content"]
    script, asked = _script(answer) if script is None else script, _script(_last_question(messages))
    flags = 0
    if messages[0]["role"] in SYSTEM_ROLES:
        flags |= Flag.SYSTEM_PROMPT.value
    if any(_has_empty_reasoning(message) for message in answers):
        flags |= Flag.EMPTY_REASONING.value
    if any(markers.occur_in(message["content"]) for message in answers):
        flags |= Flag.MARKERS.value
    if _is_refusal(answer[:REFUSAL_SAMPLE].lower()):
        flags |= Flag.REFUSAL.value
    if script and asked and script != asked:
        flags |= Flag.OTHER_SCRIPT.value
    if not any(message["role"] == "user" for message in messages):
        flags |= Flag.NO_QUESTION.value
    return flags


def _last_answer(conversation: Conversation) -> str:
    answer: str = next(
        message["content"] for message in reversed(conversation.messages) if message["role"] == "assistant"
    )
    return answer


def _last_question(messages: list[dict[str, Any]]) -> str:
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def _has_empty_reasoning(message: Mapping[str, Any]) -> bool:
    if len(message) > 2 and any(key in message and not message[key].strip() for key in REASONING_KEYS):
        return True
    return "<think>" in message["content"] and EMPTY_THINK.search(message["content"]) is not None


def _is_refusal(text: str) -> bool:
    return any(hint in text for hint in REFUSAL_HINTS) and REFUSAL.search(text) is not None


def _script(text: str) -> int:
    """Return the index in `SCRIPTS` of the script that most letters at the beginning of a text have."""
    text = text[:SCRIPT_SAMPLE]
    if text.isascii():
        return int(LETTER.search(text) is not None)
    counts = [0 if pattern is None else len(pattern.findall(text)) for pattern in SCRIPTS.values()]
    return int(np.argmax(counts))


def _answer_tokens(labels: np.ndarray) -> int:
    """Return the number of supervised tokens of the last turn, without the last one, which ends the turn."""
    supervised = (labels != IGNORE_INDEX)[::-1]
    end = int(supervised.argmax())
    length = int(supervised[end:].argmin())
    return (length or len(supervised) - end) - 1


def _compared_text(conversation: Conversation) -> bytes:
    """Return the text by which conversations are compared, without the system prompt."""
    texts = [message["content"] for message in conversation.messages if message["role"] not in SYSTEM_ROLES]
    return "\n".join(texts)[:MAX_COMPARED].encode(errors="replace")


def signatures(texts: list[bytes]) -> np.ndarray:
    """Return the minima of the hashes of all pieces of each text, (texts, HASHES) uint32.

    The share of equal entries of two texts estimates the share of the pieces that they have in common.
    """
    padded = [text.ljust(SHINGLE, b"\0") for text in texts]
    ends = np.cumsum([len(text) for text in padded])
    starts = np.concatenate([[0], ends[:-1]])
    pieces = np.frombuffer(b"".join(padded) + bytes(SHINGLE), dtype=np.uint8).astype(np.uint32)
    width = 1
    while width < SHINGLE:  # from the hashes of pieces of some width to those of twice the width
        pieces = pieces[:-width] * PIECE_FACTOR + pieces[width:]
        pieces ^= pieces >> np.uint32(15)
        width *= 2
    # The last pieces of a text extend into the next one, so they are not part of it.
    bounds = np.stack([starts, ends - SHINGLE + 1], axis=1).ravel()
    result = np.empty((len(texts), HASHES), dtype=np.uint32)
    for index, factor in enumerate(HASH_FACTORS):
        result[:, index] = np.minimum.reduceat(pieces * factor, bounds)[::2]
    return result
