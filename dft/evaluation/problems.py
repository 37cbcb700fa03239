"""Read files of problems: conversations as in training, whose last turn or `answer` is the reference."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dft.data.conversations.column_meanings import MEANING_OF, MEDIA
from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.forms import append_answer, columns
from dft.data.conversations.row_rules import RowRules
from dft.data.conversations.row_weight import WEIGHT_COLUMNS
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.template import AdaptedChat
from dft.errors import UserError


def problem_rules() -> RowRules:
    """Return the rules for rows of problems.

    Whether an answer is good, or which split a row is of, does not matter for a prompt. A row may repeat the
    question that its conversation asks.
    """
    meaningless = [column for column in MEANING_OF if column not in MEDIA]
    repeated = [column for column in ("question", "context") if column not in columns()]
    return RowRules(ignored=(*meaningless, *repeated, *WEIGHT_COLUMNS))


@dataclass(frozen=True)
class Problem:
    """A prompt and the reference that its answers are graded against.

    Attributes:
        conversation: the prompt and, as its last turn, the reference.
        reference: the `answer` of the row if it has one, else the text of the last turn.
        has_answer: whether the row has an `answer`, so that `reference` is only the answer.
        file, line: location of the row. Lines are counted from 1.
    """

    conversation: Conversation
    reference: str
    has_answer: bool
    file: Path
    line: int

    @property
    def question(self) -> str:
        """Last user turn of the prompt, or its last turn if there is no user turn."""
        prompt = self.conversation.messages[:-1]
        return next((turn for turn in reversed(prompt) if turn["role"] == "user"), prompt[-1])["content"]

    def prompt_ids(self, encoder: ChatEncoder) -> list[int]:
        """Return the token ids of the prompt: those that precede the last turn in training.

        Raises:
            UserError: the chat template raises an error for this conversation.
        """
        chat = AdaptedChat(encoder.template, self.conversation)
        try:
            text = chat.render(len(chat.messages) - 1, prompt=True)
        except BadLine as error:
            raise UserError(f"--data {self.file}:{self.line}: {error}") from None
        return encoder.text_tokenizer.token_ids(text)


def find_turn_endings(problems: Sequence[Problem], encoder: ChatEncoder) -> list[str]:
    """Return the tokens that end the reference turns in the chat template, found as in training."""
    return turn_endings([problem.conversation.last_turn_only() for problem in problems], encoder)


def turn_endings(conversations: Sequence[Conversation], encoder: ChatEncoder) -> list[str]:
    """Return the tokens that end the supervised turns of conversations in the chat template."""
    encoded = encoder.encode(conversations)
    examples = [example for group in encoded if not isinstance(group, BadLine) for example in group]
    return sorted({token for example in examples for token in example.endings if token})


def read_problems(file: Path) -> list[Problem]:
    """Read the problems of a JSON Lines file.

    A row is a conversation in any form that training accepts. Its reference is `answer` (a string or a
    number) if it has one, else its last turn, which must be the assistant's.

    Raises:
        UserError: the file cannot be read or has no problems, or a row is invalid (`file:line: reason`).
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
            problems.append(parse_problem(line, file, number))
        except BadLine as error:
            raise UserError(f"{file}:{number}: {error}; correct the line or leave it out") from None
    if not problems:
        raise UserError(f"--data {file}: holds no problems; expected JSON Lines of conversations")
    return problems


def parse_problem(line: bytes, file: Path, number: int) -> Problem:
    """Parse one row of a file of problems.

    Raises:
        BadLine: it is not a valid conversation, or it has no prompt or no reference.
    """
    answer = None
    try:
        row = json.loads(line)
    except ValueError:
        row = None  # parse_conversation reports the reason
    if isinstance(row, dict) and row.get("answer") is not None:
        answer = row["answer"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise BadLine(f"'answer' must be a string or a number, got {answer!r}", "wrong 'answer'")
        line = json.dumps(append_answer(row, str(answer) or "-")).encode()
    conversation = parse_conversation(line, problem_rules())
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
