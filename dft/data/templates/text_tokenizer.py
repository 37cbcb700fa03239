"""Tokenization of prompts and completions, as at inference."""

import json
from functools import cached_property, lru_cache

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE, WordLevel, WordPiece

GUARDS = ("0", "\n", "a", ";")
"""Texts to insert before a piece of text, for tokenizers that add a space before all input."""
COMPARED_TOKENS = 16
"""Number of tokens after the last added token of a prompt up to which its tokenization is cached."""


class TokenizedText:
    """A text with its tokens.

    Attributes:
        text: the text.
        encoding: its tokens with character offsets.
        ids: its token ids.
    """

    __slots__ = ("encoding", "ids", "text")

    def __init__(self, text: str, encoding: Encoding) -> None:
        self.text = text
        self.encoding = encoding
        self.ids = encoding.ids

    def token_at(self, position: int) -> int:
        """Return the index of the first token that begins at or after a character."""
        for character in range(position, len(self.text)):
            token = self.encoding.char_to_token(character)
            if token is not None:  # characters that a normalizer drops belong to no token
                return token if self.characters(token)[0] >= position else token + 1
        return len(self.ids)

    def characters(self, token: int) -> tuple[int, int]:
        """Return the [start, end) character range of a token."""
        characters = self.encoding.token_to_chars(token)
        assert characters is not None, "only tokens that a post-processor adds have no characters"
        return characters


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
        model = self.backend.model
        if isinstance(model, BPE | WordLevel | WordPiece):
            token = model.unk_token
            ids: set[int | None] = {self.backend.token_to_id(token) if token else None}
        else:  # Unigram says it only in JSON, which takes half a second with 150,000 entries
            ids = {json.loads(self.backend.to_str())["model"].get("unk_id")}
        return frozenset(index for index in ids if index is not None)

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def continuation_ids(self, text: str) -> list[int] | None:
        """Return the token ids of a text that continues another text.

        Returns:
            None if this is impossible, because the tokenizer adds a space before all input and the first
            token of the text merges with every guard.
        """
        for guard in self._guards:
            ids = self._ids_after(guard, text)
            if ids is not None:
                return ids
        return None

    def is_joint(self, text: TokenizedText, start: int, end: int) -> bool:
        """Return whether a prompt and its completion are tokenized in a longer text as at inference.

        Args:
            text: the longer text.
            start: the character at which the prompt ends and the completion begins.
            end: the character at which the completion ends.
        """
        return self._ends_a_token(text, end) and self._begins_with_prompt(text, start)

    @cached_property
    def _guards(self) -> tuple[str, ...]:
        """Guards to try; only the empty one if a guard does not change the tokens of the text after it."""
        is_same = [
            ids == self.token_ids(text)
            for guard in GUARDS
            for text in "bZ.5é"
            if (ids := self._ids_after(guard, text)) is not None
        ]
        return ("",) if is_same and all(is_same) else GUARDS

    def _ids_after(self, guard: str, text: str) -> list[int] | None:
        """Tokenize a text after a guard; return None if the guard does not keep its own tokens."""
        if not guard:
            return self.token_ids(text)
        whole = TokenizedText(guard + text, self.backend.encode(guard + text, add_special_tokens=False))
        skip = whole.token_at(len(guard))
        return whole.ids[skip:] if whole.ids[:skip] == self._cached_ids(guard) else None

    def _ends_a_token(self, text: TokenizedText, end: int) -> bool:
        """Return whether no token straddles a character. Added tokens may absorb white space after it."""
        after = text.token_at(end)
        if after == 0 or end >= len(text.text):
            return True
        return text.ids[after - 1] in self.added_ids or text.characters(after - 1)[1] <= end

    def _begins_with_prompt(self, text: TokenizedText, start: int) -> bool:
        """Return whether the tokens before a character equal the tokens of that text on its own.

        Added tokens split a text into parts that are tokenized separately, so only the part after the last
        added token of the prompt is compared. It is the header, which is the same for nearly all turns.
        """
        ids, after = text.ids, text.token_at(start)
        if after == 0:
            return start == 0
        if text.characters(after - 1)[1] > start:
            return False
        first = after - 1
        while first >= 0 and after - first < COMPARED_TOKENS and ids[first] not in self.added_ids:
            first -= 1
        if first >= 0 and ids[first] in self.added_ids:
            header = text.text[text.characters(first)[0] : start]
            return ids[first:after] == self._cached_ids(header)
        return ids[:after] == self.token_ids(text.text[:start])
