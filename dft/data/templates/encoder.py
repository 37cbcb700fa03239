"""Conversation -> (input_ids, labels): what the chat template renders, tokenized once, with its mask."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.sandbox.limits import MAX_RENDERED_CHARACTERS, limit_memory
from dft.data.templates.spans import ChatTemplate, Rendering
from dft.data.templates.template import DATE
from dft.errors import UserError
from dft.labels import IGNORE_INDEX

GUARDS = ("0", "\n", "a", ";")
"""Texts to tokenize a piece behind, for tokenizers that put a space in front of all they get."""
BATCH_TEXT = 1 << 20
"""Characters that are tokenized at once."""
TAIL = 16
"""Tokens behind the last special token of a prompt up to which its tokenization is worth remembering."""


@dataclass(frozen=True)
class Example:
    """One training sequence as tokens.

    Attributes:
        input_ids: (tokens,) int32.
        labels: (tokens,) int32, the same id where a token is supervised, else -100.
        endings: the stop token of each supervised turn, None where a turn ends without one.
        ends: (turns,) int32, index of the last supervised token of each of these turns.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    endings: tuple[str | None, ...]
    ends: np.ndarray


class Piece:
    """Text that is tokenized by itself, and where in a sequence it stands.

    Attributes:
        text, encoding, ids: as tokenized, `skip_chars` and `skip_tokens` of a guard at the front included.
        first_char, first_token: where what follows the guard stands in the sequence.
    """

    __slots__ = ("encoding", "first_char", "first_token", "ids", "skip_chars", "skip_tokens", "text")

    def __init__(self, text: str, encoding: Encoding, skip_chars: int = 0, skip_tokens: int = 0) -> None:
        self.text = text
        self.encoding = encoding
        self.ids = encoding.ids
        self.skip_chars, self.skip_tokens = skip_chars, skip_tokens
        self.first_char = self.first_token = 0

    def local(self, position: int) -> int:
        """A character of the sequence as one of `text`."""
        return position - self.first_char + self.skip_chars

    def token_at(self, position: int) -> int:
        """Index in the sequence of the first token that begins at or after a character of the sequence."""
        token = first_token(self.encoding, self.local(position), len(self.text))
        return token - self.skip_tokens + self.first_token


class ChatEncoder:
    """Renders and tokenizes conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template. It is not changed.
        stop_token_ids: what makes this model's generation stop besides the tokenizer's own eos
            (`generation_config.eos_token_id`). Ids outside the vocabulary are passed over: nothing ends with
            them.
        variables: what the template gets for all conversations (`{"enable_thinking": False}`); the ones a
            conversation brings win.
        today: what the template is told of today's date.

    Raises:
        UserError: a tokenizer without character offsets, or without a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int] = (),
        variables: Mapping[str, Any] | None = None,
        today: date = DATE,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer without the character offsets that exact "
                "masks need; convert it to a tokenizer.json and name the folder that holds it"
            )
        self.tokenizer = tokenizer
        self.backend = plain_backend(tokenizer)
        wanted = sorted({tokenizer.eos_token_id, *stop_token_ids} - {None})
        names = {index: self.backend.id_to_token(index) for index in wanted}
        added = tokenizer.added_tokens_decoder
        self.template = ChatTemplate(
            template_of(tokenizer),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            {name: index for index, name in names.items() if name},
            {token.content for token in added.values() if token.special},
            variables,
            today,
        )
        self.added_ids = frozenset(added)
        self._ids_of_header = lru_cache(4096)(self.ids_of)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadLine]:
        """Tokens and labels of each conversation; usually one sequence, several where history is rewritten.

        A conversation the template refuses gives the `BadLine` to report in its place.
        """
        return [
            group if isinstance(group, BadLine) else [example for _, example in group]
            for group in self.sequences(conversations)
        ]

    def sequences(
        self, conversations: Sequence[Conversation]
    ) -> list[list[tuple[Rendering, Example]] | BadLine]:
        """What `encode` gives, each sequence with the text that it was made from."""
        rendered = self.render(conversations)
        sequences = [one for group in rendered if not isinstance(group, BadLine) for one in group]
        examples = self._examples(sequences)
        return [
            group if isinstance(group, BadLine) else [(one, next(examples)) for one in group]
            for group in rendered
        ]

    def _examples(self, sequences: list[Rendering]) -> Iterator[Example]:
        """Tokenized in batches of about `BATCH_TEXT`: an encoding takes hundreds of bytes per token."""
        batch, size = [], 0
        for number, one in enumerate(sequences, 1):
            batch.append(one)
            size += len(one.text)
            if size >= BATCH_TEXT or number == len(sequences):
                encodings = self.backend.encode_batch(
                    [other.text for other in batch], add_special_tokens=False
                )
                yield from map(self.example, batch, encodings)
                batch, size = [], 0

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | BadLine]:
        """The texts of each conversation's sequences, or what is wrong with it.

        Raises:
            LimitExceeded: the template takes more than it may.
        """
        rendered: list[list[Rendering] | BadLine] = []
        with limit_memory() if self.template.template.limited else nullcontext():
            for conversation in conversations:
                try:
                    rendered.append(within_bounds(self.template.render(conversation)))
                except BadLine as error:
                    rendered.append(error)
        return rendered

    def example(self, rendering: Rendering, encoding: Encoding) -> Example:
        """Labels from spans: a token is supervised when its first character lies inside a span.

        So an end token that swallows the white space behind it (`rstrip`) is still supervised.
        `encoding` is that of the whole text. It is used wherever it begins, at each span, with the tokens of
        the prompt alone, as inference would get it. Where it does not (a header's newline and the answer's
        first are one token), the text is tokenized in pieces that are split there.
        """
        pieces = self._pieces(Piece(rendering.text, encoding), rendering.spans)
        if len(pieces) == 1:
            ids = pieces[0].ids
        else:
            ids = [token for piece in pieces for token in piece.ids[piece.skip_tokens :]]
        if rendering.stop_id is not None:
            ids = [*ids, rendering.stop_id]
        input_ids = np.array(ids, dtype=np.int32)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        ends = []
        for start, end in rendering.spans:
            first, behind = token_at(pieces, start), token_at(pieces, end)
            labels[first:behind] = input_ids[first:behind]
            ends.append(behind - 1)
        if rendering.stop_id is not None:
            labels[-1] = input_ids[-1]
            ends[-1] = len(ids) - 1
        labels[:1] = IGNORE_INDEX  # nothing precedes the first token, so nothing predicts it
        return Example(input_ids, labels, tuple(rendering.endings), np.array(ends, dtype=np.int32))

    # ---- the border between prompt and answer ----

    @cached_property
    def unknown_ids(self) -> frozenset[int]:
        """What stands for text outside the vocabulary, which cannot be decoded."""
        model = json.loads(self.backend.to_str())["model"]
        named = model.get("unk_token")
        found = {model.get("unk_id"), self.backend.token_to_id(named) if named else None}
        return frozenset(found - {None})

    def ids_of(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def continued(self, text: str) -> Piece | None:
        """A text tokenized as the continuation of another that ends with a whole token.

        None where that is not possible: the tokenizer puts a space in front of what it gets, and behind
        every guard the text's first token takes part of the guard.
        """
        for guard in self._guards:
            piece = self._behind(guard, text)
            if piece is not None:
                return piece
        return None

    def _behind(self, guard: str, text: str) -> Piece | None:
        encoding = self.backend.encode(guard + text, add_special_tokens=False)
        if not guard:
            return Piece(text, encoding)
        skip = first_token(encoding, len(guard), len(guard + text))
        if encoding.ids[:skip] != self._ids_of_header(guard):
            return None
        return Piece(guard + text, encoding, len(guard), skip)

    @cached_property
    def _guards(self) -> tuple[str, ...]:
        """What to put in front of a piece: nothing, if text by itself has the tokens it has behind others."""
        compared = [
            piece.ids[piece.skip_tokens :] == self.ids_of(text)
            for guard in GUARDS
            for text in "bZ.5é"
            if (piece := self._behind(guard, text)) is not None
        ]
        return ("",) if compared and all(compared) else GUARDS

    def _pieces(self, whole: Piece, spans: list[tuple[int, int]]) -> list[Piece]:
        """The text in pieces, split where a span would not begin with the tokens of its prompt alone.

        One piece, nearly always; also where the tokenizer cannot continue a text. There a token that
        straddles the start of a span belongs to the prompt.
        """
        pieces, cuts = [whole], []
        while True:
            starts = [start for start, _ in spans if start not in cuts]
            new = [start for start in starts if not self._begins_exactly(pieces, start)]
            if not new:
                return pieces
            cuts = sorted({*cuts, *new})
            pieces = [self._behind("", whole.text[: cuts[0]])]
            for start, end in zip(cuts, [*cuts[1:], len(whole.text)], strict=True):
                piece = self.continued(whole.text[start:end])
                if piece is None:
                    return [whole]
                before = pieces[-1]
                piece.first_char = start
                piece.first_token = before.first_token + len(before.ids) - before.skip_tokens
                pieces.append(piece)

    def _begins_exactly(self, pieces: list[Piece], start: int) -> bool:
        """Whether the tokens in front of a character are those of the text in front of it alone.

        Added tokens cut a text into parts that are tokenized one by one, so only what follows the last one
        of the prompt is compared: its header, the same for nearly all turns.
        """
        piece = piece_of(pieces, start)
        ids, encoding, position = piece.ids, piece.encoding, piece.local(start)
        behind = first_token(encoding, position, len(piece.text))
        if behind == 0:
            return position == 0
        if encoding.token_to_chars(behind - 1)[1] > position:
            return False
        first = behind - 1
        while first >= 0 and behind - first < TAIL and ids[first] not in self.added_ids:
            first -= 1
        if first >= 0 and ids[first] in self.added_ids:
            header = piece.text[encoding.token_to_chars(first)[0] : position]
            return ids[first:behind] == self._ids_of_header(header)
        return ids[:behind] == self.ids_of(piece.text[:position])


def within_bounds(sequences: list[Rendering]) -> list[Rendering]:
    """Raises `BadLine` for a conversation whose sequences have too much text to be held at once."""
    size = sum(len(one.text) for one in sequences)
    if size > MAX_RENDERED_CHARACTERS:
        raise BadLine(
            f"the chat template makes {len(sequences)} sequences of the conversation with "
            f"{size / 1e6:,.0f} MB of text; at most {MAX_RENDERED_CHARACTERS // 1_000_000} MB can be "
            "tokenized, so split it into several conversations or take it out",
            "too much text once rendered",
        )
    return sequences


def piece_of(pieces: list[Piece], position: int) -> Piece:
    """The piece that a character of the sequence stands in, or ends."""
    if len(pieces) == 1:
        return pieces[0]
    return next(piece for piece in reversed(pieces) if piece.first_char <= position)


def token_at(pieces: list[Piece], position: int) -> int:
    """Index in the sequence of the first token that begins at or after a character."""
    return piece_of(pieces, position).token_at(position)


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


def first_token(encoding: Encoding, position: int, length: int) -> int:
    """Index of the first token that begins at or after a character."""
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None:  # a normalizer may drop characters, which then belong to no token
            return token if encoding.token_to_chars(token)[0] >= position else token + 1
    return len(encoding)
