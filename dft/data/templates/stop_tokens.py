"""Tokens at which generation of an answer stops."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dft.errors import UserError


def resolve_stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_stops: Sequence[int], turn_endings: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Return the ids of all tokens that end an answer.

    These are the stop tokens of the model's generation_config, of the tokenizer and of the chat template. A
    base model often has only `<|endoftext|>` in the first two. It would continue past the `<|im_end|>` of its
    chat template into another turn. Training adds that stop token, so it is added for all models.

    Args:
        tokenizer: tokenizer of the model.
        generation_stops: stop token ids of the generation_config.
        turn_endings: tokens that end turns in the chat template.

    Returns:
        The ids, and the tokens among them that only the chat template has.

    Raises:
        UserError: there are none.
    """
    ids = {*generation_stops, tokenizer.eos_token_id} - {None}
    added = [token for token in turn_endings if tokenizer.convert_tokens_to_ids(token) not in ids]
    ids |= set(tokenizer.convert_tokens_to_ids(added))
    if not ids:
        raise UserError(
            "neither the model's generation_config nor its tokenizer or chat template has a token that ends "
            "an answer; pass a --chat_template that has one"
        )
    return sorted(ids), added
