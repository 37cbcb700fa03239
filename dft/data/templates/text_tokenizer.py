"""Tokenization of rendered text, split where a supervised span would not begin at a token boundary."""

import json
from functools import cached_property, lru_cache

from tokenizers import Encoding, Tokenizer

GUARDS = ("0", "\n", "a", ";")
"""Texts to insert before a piece of text, for tokenizers that add a space before all input."""
COMPARED_TOKENS = 16
"""Number of tokens after the last added token of a prompt up to which its tokenization is cached."""


class TokenizedText:
    """A piece of a sequence's text that is tokenized separately.

    Attributes:
        text: the text that was tokenized, including a guard of `skip_chars` characters before the piece.
        encoding: its tokens with character offsets.
        ids: its token ids.
        skip_chars, skip_tokens: number of characters and tokens of the guard.
        first_char, first_token: position of the piece within the sequence.
    """

    __slots__ = ("encoding", "first_char", "first_token", "ids", "skip_chars", "skip_tokens", "text")

    def __init__(self, text: str, encoding: Encoding, skip_chars: int = 0, skip_tokens: int = 0) -> None:
        self.text = text
        self.encoding = encoding
        self.ids = encoding.ids
        self.skip_chars, self.skip_tokens = skip_chars, skip_tokens
        self.first_char = self.first_token = 0

    @property
    def own_ids(self) -> list[int]:
        """Token ids, excluding the guard."""
        return self.ids[self.skip_tokens :]

    def local_position(self, position: int) -> int:
        """Convert a character position in the sequence to one in `text`."""
        return position - self.first_char + self.skip_chars

    def token_at(self, position: int) -> int:
        """Return the index in the sequence of the first token that begins at or after a character."""
        token = first_token_from(self.encoding, self.local_position(position), len(self.text))
        return token - self.skip_tokens + self.first_token


class TextTokenizer:
    """Tokenizer of rendered text that keeps the tokens of each prompt the same as at inference.

    Args:
        backend: tokenizer without truncation, padding and post-processing.
        added_ids: ids of the added tokens, which always split the text around them.
    """

    def __init__(self, backend: Tokenizer, added_ids: frozenset[int]) -> None:
        self.backend = backend
        self.added_ids = added_ids
        self._cached_ids = lru_cache(4096)(self.token_ids)

    @cached_property
    def unknown_ids(self) -> frozenset[int]:
        """Ids that represent text outside the vocabulary and cannot be decoded."""
        model = json.loads(self.backend.to_str())["model"]
        token = model.get("unk_token")
        ids = {model.get("unk_id"), self.backend.token_to_id(token) if token else None}
        return frozenset(ids - {None})

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def tokenize_continuation(self, text: str) -> TokenizedText | None:
        """Tokenize a text as the continuation of another text that ends with a whole token.

        Returns:
            None if this is impossible, because the tokenizer adds a space before all input and the first
            token of the text merges with every guard.
        """
        for guard in self._guards:
            piece = self._tokenize_after(guard, text)
            if piece is not None:
                return piece
        return None

    def split(self, text: str, encoding: Encoding, spans: list[tuple[int, int]]) -> list[TokenizedText]:
        """Split a text where a span would not begin with the tokens of its prompt alone.

        Nearly always the text stays in one piece. The same is true if the tokenizer cannot continue a text; a
        token that straddles the start of a span then counts as part of the prompt.

        Args:
            text: the text of a sequence.
            encoding: the encoding of the whole text.
            spans: [start, end) character ranges that are supervised.
        """
        whole = TokenizedText(text, encoding)
        pieces: list[TokenizedText] = [whole]
        cuts: list[int] = []
        while True:
            starts = [start for start, _ in spans if start not in cuts]
            new_cuts = [start for start in starts if not self._begins_with_prompt(pieces, start)]
            if not new_cuts:
                return pieces
            cuts = sorted({*cuts, *new_cuts})
            head = text[: cuts[0]]
            pieces = [TokenizedText(head, self.backend.encode(head, add_special_tokens=False))]
            for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
                piece = self.tokenize_continuation(text[start:end])
                if piece is None:
                    return [whole]
                previous = pieces[-1]
                piece.first_char = start
                piece.first_token = previous.first_token + len(previous.own_ids)
                pieces.append(piece)

    @cached_property
    def _guards(self) -> tuple[str, ...]:
        """Guards to try; only the empty one if a guard does not change the tokens of the text after it."""
        is_same = [
            piece.own_ids == self.token_ids(text)
            for guard in GUARDS
            for text in "bZ.5é"
            if (piece := self._tokenize_after(guard, text)) is not None
        ]
        return ("",) if is_same and all(is_same) else GUARDS

    def _tokenize_after(self, guard: str, text: str) -> TokenizedText | None:
        """Tokenize a text after a guard; return None if the guard does not keep its own tokens."""
        encoding = self.backend.encode(guard + text, add_special_tokens=False)
        if not guard:
            return TokenizedText(text, encoding)
        skip = first_token_from(encoding, len(guard), len(guard + text))
        if encoding.ids[:skip] != self._cached_ids(guard):
            return None
        return TokenizedText(guard + text, encoding, len(guard), skip)

    def _begins_with_prompt(self, pieces: list[TokenizedText], start: int) -> bool:
        """Return whether the tokens before a character equal the tokens of that text on its own.

        Added tokens split a text into parts that are tokenized separately, so only the part after the last
        added token of the prompt is compared. It is the header, which is the same for nearly all turns.
        """
        piece = piece_at(pieces, start)
        ids, encoding, position = piece.ids, piece.encoding, piece.local_position(start)
        after = first_token_from(encoding, position, len(piece.text))
        if after == 0:
            return position == 0
        if _characters_of(encoding, after - 1)[1] > position:
            return False
        first = after - 1
        while first >= 0 and after - first < COMPARED_TOKENS and ids[first] not in self.added_ids:
            first -= 1
        if first >= 0 and ids[first] in self.added_ids:
            header = piece.text[_characters_of(encoding, first)[0] : position]
            return ids[first:after] == self._cached_ids(header)
        return ids[:after] == self.token_ids(piece.text[:position])


def piece_at(pieces: list[TokenizedText], position: int) -> TokenizedText:
    """Return the piece that contains a character of the sequence."""
    if len(pieces) == 1:
        return pieces[0]
    return next(piece for piece in reversed(pieces) if piece.first_char <= position)


def first_token_from(encoding: Encoding, position: int, length: int) -> int:
    """Return the index of the first token that begins at or after a character.

    Args:
        encoding: the encoding of a text.
        position: index of the character.
        length: length of the text in characters.
    """
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None:  # characters that a normalizer drops belong to no token
            return token if _characters_of(encoding, token)[0] >= position else token + 1
    return len(encoding)


def _characters_of(encoding: Encoding, token: int) -> tuple[int, int]:
    """Return the [start, end) character range of a token."""
    characters = encoding.token_to_chars(token)
    assert characters is not None, "only tokens that a post-processor adds have no characters"
    return characters
