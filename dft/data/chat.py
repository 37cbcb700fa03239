"""Conversation -> (input_ids, labels): what the chat template renders, tokenized once, with its mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dft.constants import IGNORE_INDEX
from dft.data.faults import BadLine
from dft.data.rendering import ChatTemplate, Message, Rendering
from dft.errors import UserError


@dataclass(frozen=True)
class Example:
    """One training sequence as tokens.

    Attributes:
        input_ids: (tokens,) int32.
        labels: (tokens,) int32, the same id where a token is supervised, else -100.
        endings: the stop token of each supervised turn, None where a turn ends without one.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    endings: tuple[str | None, ...]


class ChatEncoder:
    """Renders and tokenizes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template. It is not changed.
        stop_token_ids: what makes this model's generation stop besides the tokenizer's own eos
            (`generation_config.eos_token_id`). Ids outside the vocabulary are passed over: nothing ends with
            them.

    Raises:
        UserError: a tokenizer without character offsets, or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer without the character offsets that exact "
                "masks need; convert it to a tokenizer.json and name the folder that holds it"
            )
        self.tokenizer = tokenizer
        self.backend = plain_backend(tokenizer)
        wanted = sorted({tokenizer.eos_token_id, *stop_token_ids} - {None})
        names = {index: self.backend.id_to_token(index) for index in wanted}
        self.template = ChatTemplate(
            template_of(tokenizer),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            {name: index for index, name in names.items() if name},
            {token.content for token in tokenizer.added_tokens_decoder.values() if token.special},
        )

    def encode(self, conversations: Sequence[list[Message]]) -> list[list[Example] | BadLine]:
        """Tokens and labels of each conversation; usually one sequence, several where history is rewritten.

        A conversation the template refuses gives the `BadLine` to report in its place.
        """
        rendered: list[list[Rendering] | BadLine] = []
        for messages in conversations:
            try:
                rendered.append(self.template.render(messages))
            except BadLine as error:
                rendered.append(error)
        texts = [one.text for group in rendered if not isinstance(group, BadLine) for one in group]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        return [
            group if isinstance(group, BadLine) else [to_example(one, next(encodings)) for one in group]
            for group in rendered
        ]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja source of the chat template; the default one where a tokenizer has several.

    Raises:
        UserError: there is none, or none of several is the default.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; pass --chat_template FILE")
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"the tokenizer has several chat templates ({names}) and no default; pass --chat_template FILE"
        ) from None


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that turns text into ids and does nothing else.

    Truncation, padding and added BOS tokens are not wanted, the template writes all there is. Without its
    post-processor it does not trim white space off the character offsets either (Llama 3 would), which puts a
    header's newline into the span behind it.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend


def to_example(rendering: Rendering, encoding: Encoding) -> Example:
    """Labels from spans: a token is supervised when its first character lies inside a span.

    So a token that straddles the start belongs to the prompt, and an end token that swallows the white space
    behind it (`rstrip`) is still supervised.
    """
    tail = [] if rendering.stop_id is None else [rendering.stop_id]
    ids = np.array([*encoding.ids, *tail], dtype=np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    length = len(rendering.text)
    for start, end in rendering.spans:
        inside = slice(first_token(encoding, start, length), first_token(encoding, end, length))
        labels[inside] = ids[inside]
    if tail:
        labels[-1] = ids[-1]
    labels[:1] = IGNORE_INDEX  # nothing precedes the first token, so nothing predicts it
    return Example(ids, labels, tuple(rendering.endings))


def first_token(encoding: Encoding, position: int, length: int) -> int:
    """Index of the first token that begins at or after a character."""
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None:  # a normalizer may drop characters, which then belong to no token
            return token if encoding.token_to_chars(token)[0] >= position else token + 1
    return len(encoding.ids)
