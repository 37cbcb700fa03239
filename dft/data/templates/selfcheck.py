"""Whether training sequences are what they should be, asked of the tokenizer in other ways.

A sequence is made from one tokenization and character offsets. Here nothing is taken from offsets: prompts
are tokenized alone, ids are decoded, ends are compared with the vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from dft.data.templates.encoder import ChatEncoder, Example
from dft.data.templates.spans import Rendering
from dft.errors import UserError
from dft.labels import IGNORE_INDEX

SHOWN = 60
"""Characters of a text that a message quotes."""
CAUSE = "the tokenizer or its chat template is unlike what exact masks rely on"


def check_conversation(encoder: ChatEncoder, sequences: Sequence[tuple[Rendering, Example]]) -> None:
    """Checks what `ChatEncoder.sequences` made of one conversation.

    Raises:
        UserError: the message lacks only the place (`file:line`).
    """
    check_endings([ending for rendering, _ in sequences for ending in rendering.endings])
    for rendering, example in sequences:
        check_sequence(encoder, rendering, example)


def check_sequence(encoder: ChatEncoder, rendering: Rendering, example: Example) -> None:
    """Checks one sequence.

    - Each span has supervised tokens of its own, and they are its text. No other token is supervised.
    - Each span that ends with a stop token has that token's id last; some do only if all do.
    - The tokens in front of each span are those of the text in front of it. That is what inference sees at
      the first turn; at a later one, either the same, or the ids of earlier turns kept and what came after
      them tokenized (which differ only where an earlier turn had to be split off, see `ChatEncoder.example`).
    - The ids as a whole stand for the text.

    Raises:
        UserError: the message lacks only the place (`file:line`).
    """
    check_endings(rendering.endings)
    ids = example.input_ids.tolist()
    supervised = np.flatnonzero(example.labels != IGNORE_INDEX)
    if not np.array_equal(example.labels[supervised], example.input_ids[supervised]):
        raise UserError(f"a label is not the token it stands under; {CAUSE}")
    counted, known, before = 0, 0, -1
    for number, ((start, end), ending, last) in enumerate(
        zip(rendering.spans, rendering.endings, example.ends.tolist(), strict=True), 1
    ):
        first = _first_of_run(supervised, before, last)
        # The very first token of a sequence is not supervised, though it may begin a span, or be all of it.
        if start == 0 and (first == 1 or last == 0):
            first = 0
        if first is None:
            raise UserError(
                f"assistant turn {number} has no supervised token of its own, or a gap between them; {CAUSE}"
            )
        counted += last - max(first, 1) + 1
        tokens = ids[first : last + 1]
        _check_end(encoder, number, tokens[-1], ending)
        appended = rendering.stop_id is not None and number == len(rendering.spans)
        text = rendering.text[start:end]
        if not _stands_for(encoder, tokens[:-1] if appended else tokens, text):
            shown = encoder.backend.decode(tokens, skip_special_tokens=False)
            raise UserError(
                f"the supervised tokens of assistant turn {number} are {_short(shown)}, but it is rendered "
                f"as {_short(text)}; {CAUSE}"
            )
        if not _is_prompt(encoder, rendering, number - 1, ids[:first], known):
            raise UserError(
                f"in front of assistant turn {number} stand other tokens than those of its prompt, "
                f"{_short(rendering.text[max(0, start - SHOWN) : start])}, tokenized alone; {CAUSE}"
            )
        known, before = first, last
    if counted != len(supervised):
        raise UserError(f"tokens outside of the assistant's turns are supervised; {CAUSE}")
    body = ids if rendering.stop_id is None else ids[:-1]
    if not _stands_for(encoder, body, rendering.text):
        shown = encoder.backend.decode(body, skip_special_tokens=False)
        raise UserError(
            f"the tokens of the conversation decode to {_short(shown)} and not to {_short(rendering.text)}, "
            f"nor does that text have these tokens; {CAUSE}"
        )


def check_endings(endings: Sequence[str | None]) -> None:
    """Raises `UserError` where some turns end with a stop token and others without."""
    named = sorted({ending for ending in endings if ending is not None})
    if named and None in endings:
        number = list(endings).index(None) + 1
        raise UserError(
            f"the chat template ends assistant turns with {' or '.join(named)}, but turn {number} without a "
            "stop token, so the model would not learn to stop there; pass a template that ends all turns "
            "(--chat_template)"
        )


def _first_of_run(supervised: np.ndarray, before: int, last: int) -> int | None:
    """The first supervised index behind `before`, if all from there to `last` are supervised."""
    low, high = np.searchsorted(supervised, [before + 1, last + 1])
    if low == high or supervised[high - 1] != last:
        return None
    first = int(supervised[low])
    return first if last - first == high - 1 - low else None


def _check_end(encoder: ChatEncoder, number: int, token: int, ending: str | None) -> None:
    if ending is not None and token != encoder.backend.token_to_id(ending):
        shown = encoder.backend.id_to_token(token)
        raise UserError(
            f"assistant turn {number} should end with the token {ending}, but the last supervised one is "
            f"{shown!r}; {CAUSE}"
        )


def _is_prompt(encoder: ChatEncoder, rendering: Rendering, turn: int, ids: list[int], known: int) -> bool:
    """Whether `ids` are the tokens of the text in front of a turn, the first `known` being checked before."""
    start = rendering.spans[turn][0]
    # First what lies behind the border that is known: to tokenize all of it for every turn is quadratic.
    if turn:
        piece = encoder.continued(rendering.text[rendering.spans[turn - 1][0] : start])
        if piece is not None and ids[known:] == piece.ids[piece.skip_tokens :]:
            return True
    if ids == encoder.ids_of(rendering.text[:start]):
        return True
    # Where the tokenizer cannot continue a text, a token that straddles the border is left to the prompt.
    return encoder.continued(rendering.text[start:]) is None


def _stands_for(encoder: ChatEncoder, ids: list[int], text: str) -> bool:
    """Whether ids decode to a text, or to one that has the same tokens.

    White space is left out of account in the end: tokenizers that mark spaces write one in front of a text,
    and tokens that swallow the space around them do not give it back. So is the mark, U+2581, which such a
    tokenizer takes for a space where it stands in the text itself.
    """
    decoded = encoder.backend.decode(ids, skip_special_tokens=False)
    if decoded == text or encoder.unknown_ids.intersection(ids):
        return True
    if encoder.ids_of(decoded) == encoder.ids_of(text):
        return True
    decoded, text = ("".join(one.replace("\u2581", " ").split()) for one in (decoded, text))
    return decoded == text or encoder.ids_of(decoded) == encoder.ids_of(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
