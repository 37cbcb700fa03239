"""Files of problems: conversations as in training, whose last answer is the reference."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.forms import append_answer
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.template import AdaptedChat
from dft.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A prompt and what it is graded against.

    Attributes:
        conversation: with the reference as its last turn, which is no part of the prompt.
        reference: the answer the row gives, else the text of the last turn.
        has_answer: whether the row gives an answer, so that `reference` is nothing but that.
        file, line: where it stands; lines count from 1.
    """

    conversation: Conversation
    reference: str
    has_answer: bool
    file: Path
    line: int

    @property
    def question(self) -> str:
        """The last turn of the user, or what else precedes the answer."""
        asked = self.conversation.messages[:-1]
        return next((one for one in reversed(asked) if one["role"] == "user"), asked[-1])["content"]

    def prompt_ids(self, encoder: ChatEncoder) -> list[int]:
        """The tokens a model is given: those that precede the last turn in training."""
        chat = AdaptedChat(encoder.template, self.conversation)
        try:
            text = chat.render(len(chat.messages) - 1, prompt=True)
        except BadLine as error:
            raise UserError(f"--data {self.file}:{self.line}: {error}") from None
        return encoder.text_tokenizer.token_ids(text)


def turn_endings(problems: Sequence[Problem], encoder: ChatEncoder) -> list[str]:
    """The tokens that end the answers in the chat template, as training finds them."""
    encoded = encoder.encode([one.conversation.last_turn_only() for one in problems])
    examples = [example for group in encoded if not isinstance(group, BadLine) for example in group]
    return sorted({token for example in examples for token in example.endings if token})


def read_problems(file: Path) -> list[Problem]:
    """The problems of a JSON Lines file.

    A row is a conversation as training reads it. One that ends with a turn of the assistant has its reference
    there; `answer` (a string or a number) is the reference where it is given, also beside such a turn.

    Raises:
        UserError: no such file, no problems in it, or a row that is none, as `file:line: reason`.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--data {file}: cannot be read ({error.strerror})") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problems.append(problem_of(line, file, number))
        except BadLine as error:
            raise UserError(f"{file}:{number}: {error}; correct the line or leave it out") from None
    if not problems:
        raise UserError(f"--data {file}: holds no problems; expected JSON Lines of conversations")
    return problems


def problem_of(line: bytes, file: Path, number: int) -> Problem:
    """Raises `BadLine`."""
    answer = None
    try:
        row = json.loads(line)
    except ValueError:
        row = None  # parse_conversation says what is wrong
    if isinstance(row, dict) and row.get("answer") is not None:
        answer = row["answer"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise BadLine(f"'answer' must be a string or a number, got {answer!r}", "wrong 'answer'")
        line = json.dumps(append_answer(row, str(answer) or "-")).encode()
    conversation = parse_conversation(line)
    if conversation.messages[-1]["role"] != "assistant":
        raise BadLine(
            "the last turn is not the assistant's and there is no 'answer', so nothing to grade against",
            "no reference",
        )
    if len(conversation.messages) == 1:
        raise BadLine("there is no turn in front of the assistant's, so there is no prompt", "no prompt")
    reference = conversation.messages[-1]["content"] if answer is None else str(answer)
    if not reference.strip():
        raise BadLine("the reference is empty", "no reference")
    return Problem(conversation, reference.strip(), answer is not None, file, number)
