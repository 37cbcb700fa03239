"""Encoder of conversations as token ids and labels, with a tokenizer and its chat template."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.sandbox.limits import MAX_RENDERED_CHARACTERS, limit_memory
from dft.data.templates.markers import Markers
from dft.data.templates.renderer import ConversationRenderer
from dft.data.templates.rendering import Rendering
from dft.data.templates.template import DATE, ChatTemplate
from dft.data.templates.text_tokenizer import TextTokenizer, TokenizedText
from dft.errors import UserError
from dft.labels import IGNORE_INDEX

NO_CONTINUATION = (
    "the tokenizer merges the beginning of an answer with every text before it, so the answer cannot be "
    "tokenized as the model would generate it; use a tokenizer that adds no space before a text"
)
SEPARATE_TOKENS = (
    "a token would straddle a prompt and its completion, so they are tokenized separately, as at inference"
)
QUOTED = 20
"""Number of characters that a remark quotes on each side of a boundary."""
BATCH_TEXT = 1 << 20
"""Number of characters that are tokenized at once."""


@dataclass(frozen=True)
class Example:
    """A training sequence as tokens.

    Attributes:
        input_ids: (tokens,) int32.
        labels: (tokens,) int32, the token id where a token is supervised, else -100.
        endings: stop token at the end of each supervised turn, or None if there is none.
        ends: (turns,) int32, index of the last supervised token of each supervised turn.
        loss_weights: (tokens,) float32, weight of each token in the loss; None if all are 1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    endings: tuple[str | None, ...]
    ends: np.ndarray
    loss_weights: np.ndarray | None = None


class ChatEncoder:
    """Encoder that renders, tokenizes and masks conversations with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template. It is not modified.
        stop_token_ids: ids at which generation of this model stops, besides the tokenizer's eos token
            (`generation_config.eos_token_id`). Ids outside the vocabulary are ignored.
        variables: variables of the template for all conversations, for example `{"enable_thinking": False}`.
            The variables of a conversation take precedence.
        today: the date for templates that write today's date.
        use_generation_tags: whether to supervise only what the {% generation %} blocks of the template mark.
        add_tokens: special tokens that the user added, which the data is expected to hold.

    Attributes:
        template: the chat template.
        renderer: renders conversations as text with supervised spans.
        special_tokens: finds special tokens in texts where they are not expected.

    Raises:
        UserError: the tokenizer is a slow one without character offsets, or has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int] = (),
        variables: Mapping[str, Any] | None = None,
        today: date = DATE,
        use_generation_tags: bool = False,
        add_tokens: Sequence[str] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer without the character offsets that exact "
                "masks need; convert it to a tokenizer.json and pass the folder that contains it"
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        # Tokens of one or two characters are ordinary text as well.
        special = [token.content for token in added.values() if token.special and len(token.content) > 2]
        # Those that the template writes may end or begin turns, so texts are not expected to hold them.
        expected = {token for token in add_tokens if token not in template_source(tokenizer)}
        self.special_tokens = Markers(token for token in special if token not in expected)
        stop_ids = sorted({tokenizer.eos_token_id, *stop_token_ids} - {None})
        stops = [tokenizer.backend_tokenizer.id_to_token(index) for index in stop_ids]
        self.template = ChatTemplate(
            template_source(tokenizer),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            variables,
            today,
        )
        self.renderer = ConversationRenderer(
            self.template,
            [token for token in stops if token],
            [token.content for token in added.values()],
            use_generation_tags,
        )

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer, reduced to converting text to ids. Copying it is slow for large vocabularies."""
        return plain_backend(self.tokenizer)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """Tokenizes text with `backend`."""
        return TextTokenizer(self.backend, frozenset(self.tokenizer.added_tokens_decoder))

    def prepare_for_fork(self) -> None:
        """Create what forked processes share, or each of them would create its own."""
        _ = self.text_tokenizer.unknown_ids

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadLine]:
        """Return the training sequences of each conversation, or the error that makes it unusable.

        A conversation has one sequence, or several if the template rewrites earlier turns.

        Raises:
            LimitExceeded: the template exceeds a limit of `dft.data.sandbox.limits`.
        """
        return [
            group if isinstance(group, BadLine) else [example for _, example in group]
            for group in self.sequences(conversations)
        ]

    def sequences(
        self, conversations: Sequence[Conversation]
    ) -> list[list[tuple[Rendering, Example]] | BadLine]:
        """Like `encode`, but return each sequence together with its text."""
        rendered = self.render(conversations)
        renderings = [item for group in rendered if not isinstance(group, BadLine) for item in group]
        examples = self._examples(renderings)
        encoded: list[list[tuple[Rendering, Example]] | BadLine] = []
        for group in rendered:
            if isinstance(group, BadLine):
                encoded.append(group)
                continue
            sequences = [next(examples) for _ in group]
            errors = [item for item in sequences if isinstance(item, BadLine)]
            pairs = [pair for item in sequences if not isinstance(item, BadLine) for pair in item]
            encoded.append(errors[0] if errors else pairs)
        return encoded

    def _examples(self, renderings: list[Rendering]) -> Iterator[list[tuple[Rendering, Example]] | BadLine]:
        """Tokenize in batches of about `BATCH_TEXT`, since an encoding takes hundreds of bytes per token."""
        batch, size = [], 0
        for number, rendering in enumerate(renderings, 1):
            batch.append(rendering)
            size += len(rendering.text)
            if size >= BATCH_TEXT or number == len(renderings):
                texts = [item.text for item in batch]
                encodings = self.backend.encode_batch(texts, add_special_tokens=False)
                yield from map(self._tokenize, batch, encodings)
                batch, size = [], 0

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | BadLine]:
        """Return the texts of each conversation's sequences, or the error that makes it unusable.

        Raises:
            LimitExceeded: the template exceeds a limit of `dft.data.sandbox.limits`.
        """
        rendered: list[list[Rendering] | BadLine] = []
        with limit_memory() if self.template.compiled.limited else nullcontext():
            for conversation in conversations:
                try:
                    renderings = self.renderer.render(conversation)
                    check_total_text(renderings)
                    rendered.append(renderings)
                except BadLine as error:
                    rendered.append(error)
        return rendered

    def _tokenize(
        self, rendering: Rendering, encoding: Encoding
    ) -> list[tuple[Rendering, Example]] | BadLine:
        """Convert a rendering to examples: one, and another one for each turn that needs its own sequence.

        A turn stays in the sequence if its prompt and its completion are tokenized in it as at inference.
        Otherwise, for example if the newline of a header and the first newline of the answer form one token,
        it gets a sequence in which the two are tokenized separately.

        Args:
            rendering: text and spans.
            encoding: the encoding of the whole text.
        """
        text = TokenizedText(rendering.text, encoding)
        is_joint = [self.text_tokenizer.is_joint(text, start, end) for start, end in rendering.spans]
        if all(is_joint):
            return [(rendering, self.example(rendering, text))]
        turns = list(zip(rendering.spans, rendering.endings, rendering.weights, is_joint, strict=True))
        sequences = []
        if any(is_joint):
            main = replace(
                rendering,
                spans=[span for span, _, _, joins in turns if joins],
                endings=[ending for _, ending, _, joins in turns if joins],
                weights=[weight for _, _, weight, joins in turns if joins],
            )
            sequences.append((main, self.example(main, text)))
        for (start, end), ending, weight, joins in turns:
            if joins:
                continue
            prompt = self.text_tokenizer.token_ids(rendering.text[:start])
            completion = self.text_tokenizer.continuation_ids(rendering.text[start:end])
            if completion is None:
                return BadLine(NO_CONTINUATION, "an answer that cannot be tokenized")
            around = repr(rendering.text[max(0, start - QUOTED) : start + QUOTED])
            remarks = {**rendering.remarks, SEPARATE_TOKENS: around}
            single = replace(
                rendering,
                text=rendering.text[:end],
                spans=[(start, end)],
                endings=[ending],
                weights=[weight],
                in_pieces=True,
                remarks=remarks,
            )
            tokens = prompt + completion
            sequences.append((single, _make_example(tokens, [(len(prompt), None)], (ending,), [weight])))
        sequences.sort(key=lambda pair: pair[0].spans[0])
        return sequences

    def example(self, rendering: Rendering, text: TokenizedText) -> Example:
        """Return the token ids and labels of a rendering that is tokenized as a whole.

        A token is supervised if its first character is inside a span. So an end token that absorbs the
        white space after it (`rstrip`) is still supervised.
        """
        spans = [(text.token_at(start), text.token_at(end)) for start, end in rendering.spans]
        return _make_example(text.ids, spans, tuple(rendering.endings), rendering.weights)


def _make_example(
    ids: list[int],
    spans: Sequence[tuple[int, int | None]],
    endings: tuple[str | None, ...],
    weights: Sequence[float],
) -> Example:
    """Return an example with [first, after) ranges of supervised tokens; None as `after` means the end."""
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    ends = []
    for first, after in spans:
        labels[first:after] = input_ids[first:after]
        ends.append((len(ids) if after is None else after) - 1)
    labels[:1] = IGNORE_INDEX  # the first token has no predecessor to predict it
    loss_weights = None
    if any(weight != 1 for weight in weights):
        loss_weights = np.ones(len(ids), dtype=np.float32)
        for (first, after), weight in zip(spans, weights, strict=True):
            loss_weights[first:after] = weight
    return Example(input_ids, labels, endings, np.array(ends, dtype=np.int32), loss_weights)


def check_total_text(renderings: list[Rendering]) -> None:
    """Check that the sequences of a conversation are small enough to be tokenized together.

    Raises:
        BadLine: they have too much text.
    """
    size = sum(len(rendering.text) for rendering in renderings)
    if size > MAX_RENDERED_CHARACTERS:
        raise BadLine(
            f"the chat template turns the conversation into {len(renderings)} sequences with "
            f"{size / 1e6:,.0f} MB of text; at most {MAX_RENDERED_CHARACTERS // 1_000_000} MB can be "
            "tokenized, so split it into several conversations or remove it",
            "too much text once rendered",
        )


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja source of the chat template, the default one if the tokenizer has several.

    Raises:
        UserError: there is no template, or there are several and no default.
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
    """Return a copy of the tokenizer's backend that only converts text to ids.

    Truncation, padding and added BOS tokens are disabled, since the template writes all tokens. Without its
    post-processor, the backend does not trim white space from character offsets either. Llama 3's
    post-processor would, which would put the newline of a header into the following span.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend
