"""Independent check of training sequences against the tokenizer.

Sequences are made from one tokenization and its character offsets. The check uses no offsets: it tokenizes
prompts separately, decodes token ids, and compares end tokens with the vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from dft.data.templates.encoder import ChatEncoder, Example
from dft.data.templates.rendering import Rendering
from dft.errors import UserError
from dft.labels import IGNORE_INDEX

QUOTED = 60
"""Number of characters of a text that an error message quotes."""
CAUSE = "the tokenizer or its chat template does not meet the assumptions of exact masks"


def check_conversation(encoder: ChatEncoder, sequences: Sequence[tuple[Rendering, Example]]) -> None:
    """Check the training sequences of one conversation, as `ChatEncoder.sequences` returns them.

    Raises:
        UserError: a sequence is wrong. The message does not name the file and line.
    """
    for rendering, example in sequences:
        check_sequence(encoder, rendering, example)


def check_sequence(encoder: ChatEncoder, rendering: Rendering, example: Example) -> None:
    """Check one sequence.

    - Every span has supervised tokens of its own, which represent its text. No other token is supervised.
    - Every span that ends with an end-of-turn token has the id of that token last.
    - The tokens before each span are those of its prompt, tokenized alone as at inference.
    - All ids together represent the text, and no added token is split into ordinary ones.

    Raises:
        UserError: a check fails. The message does not name the file and line.
    """
    ids = example.input_ids.tolist()
    supervised = np.flatnonzero(example.labels != IGNORE_INDEX)
    if not np.array_equal(example.labels[supervised], example.input_ids[supervised]):
        raise UserError(f"a label differs from the token at its position; {CAUSE}")
    counted, checked, previous_end = 0, 0, -1
    turns = zip(rendering.spans, rendering.endings, example.ends.tolist(), strict=True)
    for number, ((start, end), ending, last) in enumerate(turns, 1):
        first = _first_of_run(supervised, previous_end, last)
        # The first token of a sequence is never supervised, even if it begins a span or makes up all of it.
        if start == 0 and (first == 1 or last == 0):
            first = 0
        if first is None:
            raise UserError(
                f"assistant turn {number} has no supervised token of its own, or a gap between them; {CAUSE}"
            )
        counted += last - max(first, 1) + 1
        _check_turn(encoder, number, ids[first : last + 1], rendering.text[start:end], ending)
        if not _is_prompt(encoder, rendering, number - 1, ids[:first], checked):
            raise UserError(
                f"the tokens before assistant turn {number} are not those of its prompt, "
                f"{_quote(rendering.text[max(0, start - QUOTED) : start])}, tokenized alone; {CAUSE}"
            )
        checked, previous_end = first, last
    if counted != len(supervised):
        raise UserError(f"tokens outside of the assistant turns are supervised; {CAUSE}")
    if not _represents(encoder, ids, rendering.text):
        decoded = encoder.backend.decode(ids, skip_special_tokens=False)
        raise UserError(
            f"the tokens of the conversation decode to {_quote(decoded)} and not to "
            f"{_quote(rendering.text)}, and are not the tokens of that text; {CAUSE}"
        )
    _check_added_tokens(encoder, ids, rendering)


def _check_turn(encoder: ChatEncoder, number: int, tokens: list[int], text: str, ending: str | None) -> None:
    """Check the supervised tokens of a turn against its text and its end-of-turn token."""
    if ending is not None and tokens[-1] != encoder.backend.token_to_id(ending):
        actual = encoder.backend.id_to_token(tokens[-1])
        raise UserError(
            f"assistant turn {number} should end with the token {ending}, but its last supervised token is "
            f"{actual!r}; {CAUSE}"
        )
    if not _represents(encoder, tokens, text):
        decoded = encoder.backend.decode(tokens, skip_special_tokens=False)
        raise UserError(
            f"the supervised tokens of assistant turn {number} are {_quote(decoded)}, but it is rendered "
            f"as {_quote(text)}; {CAUSE}"
        )


def _check_added_tokens(encoder: ChatEncoder, ids: list[int], rendering: Rendering) -> None:
    """Check that the sequence has the added tokens of its text, whole and in the same order.

    Decoded text does not show whether a special token was split into ordinary tokens.
    """
    added, text = encoder.text_tokenizer.added_ids, rendering.text
    cut = rendering.spans[0][0] if rendering.in_pieces else 0
    parts = [encoder.text_tokenizer.token_ids(part) for part in (text[:cut], text[cut:])]
    expected = [token for part in parts for token in part if token in added]
    if [token for token in ids if token in added] != expected:
        raise UserError(
            f"a special token of the text {_quote(text)} is split into several tokens, or several texts form "
            f"one; {CAUSE}"
        )


def _first_of_run(supervised: np.ndarray, previous_end: int, last: int) -> int | None:
    """Return the first supervised index after `previous_end`, or None if there is a gap before `last`."""
    low, high = np.searchsorted(supervised, [previous_end + 1, last + 1])
    if low >= high or supervised[high - 1] != last:
        return None
    first = int(supervised[low])
    return first if last - first == high - 1 - low else None


def _is_prompt(encoder: ChatEncoder, rendering: Rendering, turn: int, ids: list[int], checked: int) -> bool:
    """Return whether `ids` are the tokens of the text before a turn.

    Args:
        turn: index of the turn among the spans.
        checked: number of ids at the front that were checked with an earlier turn.
    """
    start = rendering.spans[turn][0]
    # Tokenize only the new part first: tokenizing the whole prompt for every turn takes quadratic time.
    if turn:
        since = encoder.text_tokenizer.continuation_ids(rendering.text[rendering.spans[turn - 1][0] : start])
        if since is not None and ids[checked:] == since:
            return True
    return ids == encoder.text_tokenizer.token_ids(rendering.text[:start])


def _represents(encoder: ChatEncoder, ids: list[int], text: str) -> bool:
    """Return whether ids decode to a text, or to another text that has the same tokens.

    As a last resort white space is ignored: tokenizers that mark spaces add one before a text, and tokens
    that absorb the spaces around them do not restore them. The mark, U+2581, is ignored too, since such
    tokenizers read it as a space where it occurs in the text itself.
    """
    decoded = encoder.backend.decode(ids, skip_special_tokens=False)
    token_ids = encoder.text_tokenizer.token_ids
    if decoded == text or encoder.text_tokenizer.unknown_ids.intersection(ids):
        return True
    if token_ids(decoded) == token_ids(text):
        return True
    decoded, text = ("".join(part.replace("\u2581", " ").split()) for part in (decoded, text))
    return decoded == text or token_ids(decoded) == token_ids(text)


def _quote(text: str) -> str:
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")
