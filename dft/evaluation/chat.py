"""A conversation with a model: its history, its prompts, and answers that arrive token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dft.data.conversations.conversation import Conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.template import AdaptedChat
from dft.data.templates.token_decoder import TokenDecoder
from dft.errors import UserError
from dft.evaluation.sampling import SamplingSettings, check_vocabulary, generation_config


class End(Enum):
    """Why an answer ended."""

    STOP_TOKEN = "the model ended it"
    MAX_NEW_TOKENS = "cut off at --max_new_tokens"
    CONTEXT = "cut off where the model has no further positions"
    INTERRUPTED = "stopped by Ctrl-C"


@dataclass(frozen=True)
class Piece:
    """Generated text of one token, or of several that form one character.

    Attributes:
        text: the text, or the stop token.
        p: for each token its probability under the model after everything before it, before temperature and
            top_p.
        is_stop: whether this is the stop token, which is not part of the answer.
    """

    text: str
    p: tuple[float, ...]
    is_stop: bool = False


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: its text as it is stored in the conversation: without special tokens.
        ids: its token ids, without the stop token.
        p: the probability of each token, and of the stop token if there is one; see `Piece`.
        end: why it ended.
        left_out: special tokens in it that are not part of the text.
    """

    text: str
    ids: list[int]
    p: list[float]
    end: End
    left_out: list[str]


class Chat:
    """A conversation with a model. Prompts are rendered and tokenized as in training.

    Args:
        model: the model, on its device. Its own generation_config is not used.
        encoder: the tokenizer with its chat template.
        stops: ids of the tokens that end an answer.
        settings: how answers are drawn; `samples`, `batch_size` and `seed` are not used.
        limit: number of positions of the model; None if it has no such limit.

    Attributes:
        system: text of the system turn; "" for none.
        messages: the user and assistant turns so far.
        unended: number of answers among them that did not end with a stop token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ChatEncoder,
        stops: Sequence[int],
        settings: SamplingSettings,
        limit: int | None,
    ) -> None:
        self.model, self.encoder, self.stops = model.eval(), encoder, list(stops)
        self.tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.settings, self.limit = settings, limit
        self.system = ""
        self.messages: list[dict[str, Any]] = []
        self.unended = 0

    def clear(self) -> None:
        """Remove all turns except the system turn."""
        self.messages.clear()
        self.unended = 0

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation with its system turn."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def prompt_ids(self, turns: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a prompt: those that precede an answer in training.

        Raises:
            UserError: the chat template raises an error for this conversation.
        """
        conversation = Conversation(turns, (False,) * len(turns))
        try:
            text = AdaptedChat(self.encoder.template, conversation).render(prompt=True)
        except BadLine as error:
            raise UserError(f"the chat template cannot render this conversation: {error}") from None
        return self.encoder.text_tokenizer.token_ids(text)

    def ask(self, question: str, show: Callable[[Piece], None]) -> Reply:
        """Generate the answer to a question and append both to the conversation.

        An answer that Ctrl-C stops is appended as far as it got; without any text, neither is appended.

        Args:
            question: the next user turn.
            show: called with each piece of the answer as soon as it is generated.

        Raises:
            UserError: the question or the system prompt is not valid text, the template cannot render it, or
                the conversation is as long as the model's positions. The conversation is unchanged then.
        """
        for name, text in (("question", question), ("system prompt", self.system)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"the {name} has bytes that are not valid UTF-8") from None
        turn = {"role": "user", "content": question}
        prompt = self.prompt_ids([*self.turns, turn])
        check_vocabulary(self.model, self.tokenizer, [prompt])
        reply = self._generate(prompt, self._available(len(prompt)), show)
        if reply.text or reply.end is not End.INTERRUPTED:
            self.messages += [turn, {"role": "assistant", "content": reply.text}]
            self.unended += reply.end is not End.STOP_TOKEN
        return reply

    def _available(self, prompt_length: int) -> int:
        """Return the maximum number of tokens of the answer."""
        if self.limit is None:
            return self.settings.max_new_tokens
        if prompt_length >= self.limit:
            raise UserError(
                f"the conversation has {prompt_length:,} tokens with this question, and the model has "
                f"{self.limit:,} positions; start a new conversation (/reset)"
            )
        return min(self.settings.max_new_tokens, self.limit - prompt_length)

    def _generate(self, prompt: list[int], max_new_tokens: int, show: Callable[[Piece], None]) -> Reply:
        pad = self.stops[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        settings = replace(self.settings, max_new_tokens=max_new_tokens)
        # `generate` would take every option that this leaves unset from the model's own config.
        config = self.model.generation_config = generation_config(settings, self.stops, pad)
        stream = AnswerStream(self.tokenizer, self.stops, show)
        ids = torch.tensor([prompt], device=self.model.device)
        interrupted = False
        try:
            with torch.inference_mode():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([stream]),
                    streamer=stream,
                )
        except KeyboardInterrupt:
            interrupted = True
        stream.flush()
        if stream.stopped:
            end = End.STOP_TOKEN
        elif interrupted:
            end = End.INTERRUPTED
        else:
            is_full = max_new_tokens < self.settings.max_new_tokens
            end = End.CONTEXT if is_full else End.MAX_NEW_TOKENS
        return Reply(self._text(stream.ids), stream.ids, stream.p, end, self._special(stream.ids))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _special(self, ids: list[int]) -> list[str]:
        special = set(self.tokenizer.all_special_ids)
        return list(dict.fromkeys(self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in special))


class AnswerStream(BaseStreamer, LogitsProcessor):
    """Receives the tokens of one answer from `generate`, with their probabilities.

    As a logits processor it sees the logits of each position before temperature and top_p, which transformers
    applies after the processors of the caller. It does not change them.

    Args:
        tokenizer: decodes the tokens.
        stops: ids of the stop tokens.
        show: called with each piece of text.

    Attributes:
        ids: token ids without the stop token.
        p: their probabilities, and that of the stop token.
        stopped: whether there was a stop token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], show: Callable[[Piece], None]
    ) -> None:
        self.tokenizer, self.stops, self.show = tokenizer, frozenset(stops), show
        self.ids: list[int] = []
        self.p: list[float] = []
        self.stopped = False
        self._decoder = TokenDecoder(tokenizer)
        self._shown = 0  # number of tokens that were shown
        self._log_p: Tensor | None = None  # (1, vocab)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._log_p = scores.float().log_softmax(-1)
        return scores

    def put(self, value: Tensor) -> None:
        """Receive the prompt, which comes before any logits, and then one token at a time."""
        if self._log_p is None:
            return
        token_id = int(value.item())
        self.p.append(float(self._log_p[0, token_id].exp()))
        if token_id in self.stops:
            self.flush()
            self.stopped = True
            self.show(Piece(self.tokenizer.convert_ids_to_tokens(token_id), (self.p[-1],), is_stop=True))
            return
        self.ids.append(token_id)
        text = self._decoder.push(token_id)
        if text is not None:
            self._show(text)

    def flush(self) -> None:
        """Show the tokens of an incomplete last character."""
        if self._decoder.pending:
            self._show(self._decoder.flush())

    def end(self) -> None:
        """Called by `generate`; the answer is complete."""

    def _show(self, text: str) -> None:
        start, self._shown = self._shown, len(self.ids)
        self.show(Piece(text, tuple(self.p[start : self._shown])))
