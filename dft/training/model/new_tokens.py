"""Embeddings of tokens that a run adds to the vocabulary."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dft.arguments.parser import Arguments
from dft.data.templates.tokenizer import tokens_added_to
from dft.errors import UserError

NEW_TOKEN_FLAGS = "--add_tokens, --chat_template"
"""Flags that decide whether there are new tokens, for error messages."""
CHUNK = 8192
"""Number of rows that are summed at a time, so that no copy of a whole embedding is made."""


def add_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> list[str]:
    """Give each token that the saved model lacks an embedding, and add notes to `arguments.notes`.

    The rows of all new tokens begin as the mean of the rows of the other tokens, like those that transformers
    adds, but without random noise. An added token may have the id of a row that no token of the saved model
    used. Such rows are often zero or random, so they begin as the mean, too.

    Args:
        model: the model, as loaded. Under ZeRO-3, its weights may be partitioned. On the meta device, only
            shapes change.
        tokenizer: the tokenizer of the run.
        arguments: the parsed flags.

    Returns:
        The new tokens, in the order of their ids.

    Raises:
        UserError: the tokenizer has ordinary tokens without an embedding, so it belongs to another model.
    """
    rows = model.config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    beyond = [token for token, token_id in vocabulary.items() if token_id >= rows]
    if not {vocabulary[token] for token in beyond} <= set(tokenizer.added_tokens_decoder):
        raise UserError(
            f"--model_name_or_path {arguments.model.model_name_or_path}: the tokenizer has {len(tokenizer)} "
            f"tokens and the model {rows} embeddings; they do not belong together"
        )
    flags = arguments.model
    added = tokens_added_to(
        tokenizer, flags.model_name_or_path, flags.trust_remote_code, flags.add_tokens or ()
    )
    tokens = sorted({*beyond, *added}, key=vocabulary.__getitem__)
    if not tokens:
        return []
    ids = {vocabulary[token] for token in tokens}
    new_rows = max(rows, max(ids) + 1)
    if new_rows > rows:
        model.resize_token_embeddings(new_rows, mean_resizing=False)  # its rows are replaced below
        arguments.notes.append(
            f"embeddings: {rows} -> {new_rows} rows, for the tokens added to the tokenizer"
        )
    used = sorted(set(vocabulary.values()) - ids)
    set_to_mean(model, sorted({*ids, *range(rows, new_rows)}), used)
    return tokens


@torch.no_grad()
def set_to_mean(model: PreTrainedModel, new: Sequence[int], used: Sequence[int]) -> None:
    """Set rows of the input and output embedding to the mean of other rows, identically on all ranks.

    Args:
        model: the model. All ranks must call this under ZeRO-3.
        new: the rows to set.
        used: the rows to take the mean of.
    """
    parameters = [
        parameter
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters(recurse=False)  # the weight, and the bias of some heads
    ]
    for parameter in dict.fromkeys(parameters):  # a tied weight is set once
        with gathered(parameter) as is_writer:
            if is_writer and not parameter.is_meta:
                mean = mean_of_rows(parameter.data, used)
                parameter.data[torch.tensor(new, device=parameter.device)] = mean.to(parameter.dtype)


def mean_of_rows(weight: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the mean of some rows of a weight, summed in float64.

    Args:
        weight: (vocab, hidden), or the bias of a head, (vocab,).
        rows: their indices.

    Returns:
        (hidden,) or (), float64.
    """
    total = weight.new_zeros(weight.shape[1:], dtype=torch.float64)
    for chunk in torch.tensor(rows, device=weight.device).split(CHUNK):
        total += weight[chunk].double().sum(0)
    return total / len(rows)


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[bool]:
    """Gather a parameter that ZeRO-3 has partitioned. Yields whether this rank has to write to it.

    What rank 0 writes reaches all ranks when the context ends.
    """
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    from deepspeed import comm, zero  # slow to import, and needed only here

    with zero.GatheredParameters([parameter], modifier_rank=0):
        yield comm.get_rank() == 0


def check_embeddings_not_frozen(model: PreTrainedModel, tokens: Iterable[str], arguments: Arguments) -> None:
    """Raise `UserError` if `--freeze` would leave the embedding of a new token untrained."""
    patterns = arguments.model.freeze
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    if not patterns or not tokens or all(parameter.requires_grad for parameter in parameters):
        return
    raise UserError(
        f"--freeze {' '.join(patterns)}: {' '.join(tokens)} had to be added to the vocabulary, and frozen "
        "embeddings would leave theirs untrained; do not freeze the input and output embedding, or train "
        f"without new tokens ({NEW_TOKEN_FLAGS})"
    )
