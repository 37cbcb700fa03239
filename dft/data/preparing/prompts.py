"""Prompts of prepared conversations as at inference, each with its reference answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dft.data.batches.dataset import Sequences
from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.preparing.lookup import read_conversations
from dft.data.reading.data_file import DataFile
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.template import AdaptedChat

FIRST_BATCH = 64
"""Number of conversations that are looked up first. Each further batch has twice as many."""


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt at inference, and the answer that the data has for it.

    Attributes:
        file, line: location of the conversation. Lines are counted from 1.
        question: the last message of the prompt.
        text: the prompt as the chat template renders it, with its generation prompt.
        ids: token ids of `text`.
        reference: what the model has to generate, without the end-of-turn token.
    """

    file: str
    line: int
    question: str
    text: str
    ids: list[int]
    reference: str


@dataclass
class PromptSelection:
    """The first prompts of a dataset that can be used.

    Attributes:
        prompts: the prompts.
        conversations: number of conversations of the dataset.
        unanswered: number of conversations that were passed over because their last turn is not an answer
            that is trained.
        too_long: number of conversations that were passed over because their prompts are too long.
    """

    prompts: list[ReferencePrompt]
    conversations: int
    unanswered: int = 0
    too_long: int = 0


def first_prompts(
    dataset: Sequences, sources: Sequence[DataFile], encoder: ChatEncoder, count: int, longest: int
) -> PromptSelection:
    """Return the prompts of the last turns of the first conversations of a dataset.

    Args:
        dataset: the prepared conversations.
        sources: the files that it comes from.
        encoder: renders and tokenizes the conversations.
        count: number of prompts, if the dataset has as many.
        longest: maximum number of tokens of a prompt.
    """
    origins = _origins(dataset)
    selection = PromptSelection([], len(origins))
    for (file, line), conversation in _conversations(origins, sources):
        prompt = _last_prompt(conversation, encoder, dataset.files[file], line)
        if prompt is None:
            selection.unanswered += 1
        elif len(prompt.ids) > longest:
            selection.too_long += 1
        else:
            selection.prompts.append(prompt)
        if len(selection.prompts) == count:
            break
    return selection


def _origins(dataset: Sequences) -> list[tuple[int, int]]:
    """Return the file and the line of each conversation, in the order of the files."""
    plain = dataset.unpacked()
    return list(dict.fromkeys(plain.origins(row)[0] for row in range(len(plain))))


def _conversations(
    origins: Sequence[tuple[int, int]], sources: Sequence[DataFile]
) -> Iterator[tuple[tuple[int, int], Conversation]]:
    """Yield conversations in order, reading no more of the files than needed for those that are taken."""
    start, size = 0, FIRST_BATCH
    while start < len(origins):
        batch = origins[start : start + size]
        conversations = read_conversations(sources, batch)
        for origin in batch:
            if origin in conversations:  # unless the file was changed since it was prepared
                yield origin, conversations[origin]
        start, size = start + size, 2 * size


def _last_prompt(
    conversation: Conversation, encoder: ChatEncoder, file: str, line: int
) -> ReferencePrompt | None:
    """Return the prompt of the last turn, or None if that turn has no prompt or is not trained."""
    last = len(conversation.messages) - 1
    if not last or not conversation.supervised[last]:
        return None
    try:
        completion = encoder.renderer.finder.find(AdaptedChat(encoder.template, conversation), last)
    except BadLine:
        return None  # a line of a JSON array may have several elements, and the first may be unusable
    reference = completion.text.removesuffix(completion.ending or "").strip()
    ids = encoder.text_tokenizer.token_ids(completion.prompt)
    question = conversation.messages[last - 1]["content"]
    return ReferencePrompt(file, line, question, completion.prompt, ids, reference)
