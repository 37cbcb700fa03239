"""Prompts of prepared conversations as at inference, each with its reference answer."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dft.data.batches.dataset import Sequences
from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import RowLeftOut, RowRules
from dft.data.reading.data_file import DataFile
from dft.data.reading.reader import read_batches
from dft.data.reading.records import BOM, Record
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.template import AdaptedChat
from dft.errors import UserError

Origin = tuple[int, int]
"""File number and line number of a conversation."""
END: tuple[Origin, list[int]] = ((sys.maxsize, 0), [])
"""Comes after all conversations of a dataset."""


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
        conversations: number of conversations that were looked at: all of them if there are too few prompts.
        unanswered: number of conversations that were passed over because their last turn is not an answer
            that is trained.
        too_long: number of conversations that were passed over because their prompts are too long.
    """

    prompts: list[ReferencePrompt]
    conversations: int = 0
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
    selection = PromptSelection([])
    for (file, line), _, conversation in conversations_of(dataset.unpacked(), sources, encoder):
        prompt = _last_prompt(conversation, encoder, dataset.files[file], line)
        selection.conversations += 1
        if prompt is None:
            selection.unanswered += 1
        elif len(prompt.ids) > longest:
            selection.too_long += 1
        else:
            selection.prompts.append(prompt)
        if len(selection.prompts) == count:
            break
    return selection


def conversations_of_rows(
    dataset: Sequences, rows: Sequence[int], sources: Sequence[DataFile], encoder: ChatEncoder
) -> dict[int, Conversation]:
    """Return the conversation of each of some rows of an unpacked dataset.

    Raises:
        UserError: there is none at the location of a row any more.
    """
    origins = {dataset.origins(row)[0] for row in rows}
    members = [row for row in range(len(dataset)) if dataset.origins(row)[0] in origins]
    part = Sequences(dataset.path, dataset.order[members], files=dataset.files)
    conversations = {
        members[row]: conversation
        for _, group, conversation in conversations_of(part, sources, encoder)
        for row in group
    }
    for row in rows:
        if row not in conversations:
            file, line = dataset.origins(row)[0]
            raise UserError(
                f"{dataset.files[file]}:{line}: the conversation that was prepared is not there; was the "
                "file changed in the meantime?"
            )
    return conversations


def conversations_of(
    dataset: Sequences, sources: Sequence[DataFile], encoder: ChatEncoder
) -> Iterator[tuple[Origin, list[int], Conversation]]:
    """Yield the conversations of an unpacked dataset with their origins and rows, in the order of the files.

    The files are read up to the conversations that are taken. A JSON array may have all its elements on one
    line, so conversations are recognized by their tokens.
    """
    stored = _stored_conversations(dataset)
    origin, rows = next(stored, END)
    for place, record, rules in _records(sources):
        while origin < place:  # an unusable element of the same line, or the file was changed
            origin, rows = next(stored, END)
        if origin == END[0]:
            return
        if origin != place:
            continue
        conversation = _parse(record, rules)
        if conversation is not None and _has(
            encoder, conversation, [dataset[row]["input_ids"] for row in rows]
        ):
            yield origin, rows, conversation
            origin, rows = next(stored, END)


def _records(sources: Sequence[DataFile]) -> Iterator[tuple[Origin, Record, RowRules]]:
    """Yield the readable records of all files with their origins and the rules of their files."""
    for file, source in enumerate(sources):
        for batch in read_batches(source):
            for record in batch.records:
                if record.flaw is None:
                    yield (file, record.line), record, source.rules


def _stored_conversations(dataset: Sequences) -> Iterator[tuple[Origin, list[int]]]:
    """Yield the origin and the rows of each conversation of an unpacked dataset."""
    rows: list[int] = []
    previous: tuple[Origin, int] | None = None
    for row in range(len(dataset)):
        (origin,), number = dataset.origins(row), dataset.part(row).number
        if previous is not None and (origin != previous[0] or number <= previous[1]):
            yield previous[0], rows
            rows = []
        rows.append(row)
        previous = origin, number
    if previous is not None:
        yield previous[0], rows


def _parse(record: Record, rules: RowRules) -> Conversation | None:
    """Return the conversation of a record, None if it has none that is used."""
    try:
        return parse_conversation(record.text.removeprefix(BOM) if record.line == 1 else record.text, rules)
    except (BadLine, RowLeftOut):
        return None


def _has(encoder: ChatEncoder, conversation: Conversation, sequences: list[np.ndarray]) -> bool:
    """Return whether a conversation has a stored sequence, which may be truncated on the left or right."""
    for group in encoder.encode([conversation, conversation.last_turn_only()]):
        for example in [] if isinstance(group, BadLine) else group:
            for ids in sequences:
                whole, size = example.input_ids, len(ids)
                if np.array_equal(whole[:size], ids) or np.array_equal(whole[len(whole) - size :], ids):
                    return True
    return False


def _last_prompt(
    conversation: Conversation, encoder: ChatEncoder, file: str, line: int
) -> ReferencePrompt | None:
    """Return the prompt of the last turn, or None if that turn has no prompt or is not trained."""
    last = len(conversation.messages) - 1
    if not last or not conversation.supervised[last]:
        return None
    completion = encoder.renderer.finder.find(AdaptedChat(encoder.template, conversation), last)
    reference = completion.text.removesuffix(completion.ending or "").strip()
    ids = encoder.text_tokenizer.token_ids(completion.prompt)
    question = conversation.messages[last - 1]["content"]
    return ReferencePrompt(file, line, question, completion.prompt, ids, reference)
