"""Decoding of tokens one after the other, where several tokens may form one character."""

from transformers import PreTrainedTokenizerBase

MAX_TOKENS_PER_CHARACTER = 8
"""Maximum number of tokens to combine into one character; after that, tokens are shown as decoded."""


class TokenDecoder:
    """Decodes the tokens of a text as they come, so that the pieces concatenate to the text.

    Args:
        tokenizer: tokenizer of the text.

    Attributes:
        pending: tokens that have been pushed and are not decoded yet, because they end within a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []
        # The previous complete tokens: some tokenizers drop the space of a first token.
        self._context: list[int] = []

    def push(self, token_id: int) -> str | None:
        """Return the text of the pending tokens and of this one, None if it ends within a character."""
        self.pending.append(token_id)
        text = self._pending_text()
        if text.endswith("\ufffd") and len(self.pending) < MAX_TOKENS_PER_CHARACTER:
            return None
        self._context, self.pending = self.pending, []
        return text

    def flush(self) -> str:
        """Return the text of the pending tokens, with U+FFFD for the character that they do not complete."""
        text = self._pending_text() if self.pending else ""
        self._context, self.pending = self.pending or self._context, []
        return text

    def _pending_text(self) -> str:
        context_length = len(self._decode(self._context)) if self._context else 0
        return self._decode(self._context + self.pending)[context_length:]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
