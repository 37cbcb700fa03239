"""Collators that turn examples into a batch of tensors: padded, packed into padded rows, or padding-free.

An example holds one sequence, `input_ids` (tokens,) and `labels` (tokens,), or several concatenated
sequences, with the number of tokens of each in `seq_lengths`. The first token of a sequence is never a
target. An example may also have `origins`, (sequences, 2): the file number and line number of each sequence;
and `loss_weights`, (tokens,) at least 0: the weight of each token in the loss. A token of weight 0 is not
supervised. It may have `base_logp`, (tokens,): the log-probability of each supervised token under the model
before training.

In addition to the model's inputs, every batch contains

    loss_positions  (supervised tokens,) int64, the positions whose next token is supervised. Computed here on
                    the CPU, so that no training step has to synchronize with the accelerator to count them.
    sequence_ids    (batch, seq) int64, the number of the sequence that each token belongs to, -1 for padding.
    origins         (sequences, 2) int64, if any example has origins; (-1, -1) for examples without.
    loss_weights    (batch, seq) int32, if any example has weights: the bits of float32 numbers, because
                    transformers' Trainer converts floating-point inputs to the dtype of DeepSpeed. They are 1
                    for examples without weights. `loss_weights_of` returns the numbers.
    base_logp       (batch, seq) int32, if any example has them: the bits of float32 numbers, NaN where a
                    token is not supervised. `base_logp_of` returns the numbers.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dft.labels import IGNORE_INDEX, loss_positions


@dataclass(frozen=True)
class PaddedCollator:
    """Collator that pads each example on the right to the longest one of the batch.

    Attributes:
        pad_token_id: any id of the vocabulary; padding is neither attended to nor supervised.
        shares: number of ranks that share each sequence.
    """

    pad_token_id: int
    shares: int = 1
    batching: ClassVar[str] = "padded on the right"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a padded batch.

        Returns:
            input_ids, labels, attention_mask: (batch, seq) int64; and the entries listed in the module
            docstring.

        Raises:
            ValueError: an example holds several sequences, which an attention mask cannot separate.
        """
        for example in examples:
            if len(_sequence_lengths(example)) > 1:
                raise ValueError(
                    f"an example holds {len(example['seq_lengths'])} sequences, which padding would join; "
                    "use PackedCollator or FlatCollator"
                )
        ids, labels = _pad(examples, self.pad_token_id)
        ones = [torch.ones(len(example["input_ids"]), dtype=torch.int64) for example in examples]
        mask = pad_sequence(ones, batch_first=True)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return _add_bookkeeping(batch, examples, ids.shape[1], self.shares)


@dataclass(frozen=True)
class PackedCollator:
    """Collator for rows of several sequences: pads the rows and separates the sequences by `position_ids`.

    The batch has no attention mask, because transformers derives the boundaries between sequences from
    restarting positions only when no mask is passed. Each padding token is a separate sequence that no other
    token attends to.

    Attributes:
        pad_token_id: any id of the vocabulary.
    """

    pad_token_id: int
    batching: ClassVar[str] = "packed rows"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | int]:
        """Return a batch of packed rows.

        Returns:
            input_ids, labels, position_ids: (batch, seq) int64. num_tokens: int, the tokens that are not
            padding. Plus the entries listed in the module docstring.
        """
        ids, labels = _pad(examples, self.pad_token_id)
        width = ids.shape[1]
        positions = []
        for example in examples:
            lengths = _sequence_lengths(example)
            # Padding restarts at every token: long padding must not look like a long sequence, for which
            # some rotary positions (longrope) change the frequencies of the whole batch.
            positions.append(_restarting_positions([*lengths, *[1] * (width - sum(lengths))]))
        position_ids = torch.stack(positions)  # (batch, seq)
        labels[position_ids == 0] = IGNORE_INDEX
        batch = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": position_ids,
            "num_tokens": sum(len(example["input_ids"]) for example in examples),
        }
        return _add_bookkeeping(batch, examples, width)


@dataclass(frozen=True)
class FlatCollator:
    """Collator that concatenates all sequences of a batch into one row, for variable-length flash attention.

    Returns the same entries as transformers' `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`, and
    also accepts examples that hold several sequences.

    Attributes:
        shares: number of ranks that share each row.
    """

    shares: int = 1
    batching: ClassVar[str] = "padding-free"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | int]:
        """Return one row with the tokens of all sequences, and the boundaries between them.

        Returns:
            input_ids, labels, position_ids: (1, tokens) int64. cu_seq_lens_q, cu_seq_lens_k:
            (sequences + 1,) int32, the cumulative sequence lengths, starting at 0. max_length_q,
            max_length_k: int, the tokens of the longest sequence. Plus the entries listed in the module
            docstring.
        """
        lengths = [length for example in examples for length in _sequence_lengths(example)]
        position_ids = _restarting_positions(lengths)
        labels = torch.cat([_int64(example["labels"]) for example in examples])
        labels[position_ids == 0] = IGNORE_INDEX
        bounds = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        batch = {
            "input_ids": torch.cat([_int64(example["input_ids"]) for example in examples])[None],
            "labels": labels[None],
            "position_ids": position_ids[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds.clone(),
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        return _add_bookkeeping(batch, examples, None, self.shares)


def _sequence_lengths(example: Mapping[str, Any]) -> list[int]:
    """Return the number of tokens in each sequence of an example, in order.

    Raises:
        ValueError: `seq_lengths` contains a value below 1 or does not add up to the number of tokens.
    """
    total = len(example["input_ids"])
    lengths = example.get("seq_lengths")
    if lengths is None:
        return [total]
    lengths = [int(length) for length in lengths]
    if sum(lengths) != total or min(lengths, default=0) < 1:
        raise ValueError(f"seq_lengths {lengths} must be positive and add up to the example's {total} tokens")
    return lengths


def _add_bookkeeping(
    batch: dict[str, Any], examples: Sequence[Mapping[str, Any]], width: int | None, shares: int = 1
) -> dict[str, Any]:
    """Add `loss_positions`, `sequence_ids`, and `loss_weights`, `base_logp`, `origins` where there are any.

    Args:
        width: number of tokens that each example is padded to; None if the examples are concatenated in one
            row.
        shares: number of ranks that share each row.
    """
    numbers: list[int] = []  # of the sequence, for each run of tokens
    run_lengths: list[int] = []
    sequences = 0
    for example in examples:
        lengths = _sequence_lengths(example)
        padding = 0 if width is None else width - sum(lengths)
        numbers += [*range(sequences, sequences + len(lengths)), -1]
        run_lengths += [*lengths, padding]
        sequences += len(lengths)
    ids = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(run_lengths))
    if any("loss_weights" in example for example in examples):
        weights = [_loss_weights(example) for example in examples]
        whole = torch.cat(weights)[None] if width is None else pad_sequence(weights, True, 1.0)
        batch["labels"][whole == 0] = IGNORE_INDEX
        batch["loss_weights"] = whole.view(torch.int32)
    batch |= {
        "loss_positions": loss_positions(batch["labels"]),
        "sequence_ids": ids.view_as(batch["labels"]),
    }
    if any("base_logp" in example for example in examples):
        scores = [_base_logp(example) for example in examples]
        whole = torch.cat(scores)[None] if width is None else pad_sequence(scores, True, math.nan)
        if whole.flatten()[batch["loss_positions"] + 1].isnan().any():
            raise ValueError("a supervised token has no base_logp; score all examples with the base model")
        batch["base_logp"] = whole.view(torch.int32)
    if shares > 1:
        batch |= _share_positions(batch["loss_positions"], batch["labels"].shape[1], shares)
    if any("origins" in example for example in examples):
        batch["origins"] = torch.cat([_origins(example) for example in examples])
    return batch


def _share_positions(positions: Tensor, width: int, shares: int) -> dict[str, Any]:
    """Return the `loss_positions` of each share of the columns of a batch.

    Computed here for the same reason as `loss_positions`.

    Args:
        positions: the `loss_positions` of a batch of `width` columns.
        shares: number of shares, of equal width; the last ones may be narrower or empty.

    Returns:
        share_positions: (supervised tokens,) int64, the positions in the first share, then in the second, and
        so on. share_counts: their number in each share.
    """
    share_width = -(-width // shares)
    rows, columns = positions // width, positions % width
    share = columns // share_width
    within = rows * share_width + columns % share_width
    counts = torch.bincount(share, minlength=shares)
    return {
        "share_positions": within[share.argsort(stable=True)],
        "share_counts": tuple(counts.tolist()),
    }


def _loss_weights(example: Mapping[str, Any]) -> Tensor:
    """Return the weights of the tokens of an example, (tokens,) float32."""
    if "loss_weights" not in example:
        return torch.ones(len(example["input_ids"]))
    return _token_column(
        example,
        "loss_weights",
        lambda weights: np.isfinite(weights) & (weights >= 0),
        "numbers of at least 0, the weight of each token; rename the column if it means something else",
    )


def _base_logp(example: Mapping[str, Any]) -> Tensor:
    """Return the base model's scores of the tokens of an example, (tokens,) float32, NaN without any."""
    if "base_logp" not in example:
        return torch.full((len(example["input_ids"]),), math.nan)
    return _token_column(
        example, "base_logp", lambda scores: ~(scores > 0), "log-probabilities, at most 0, of the tokens"
    )


def _token_column(
    example: Mapping[str, Any], name: str, is_valid: Callable[[np.ndarray], np.ndarray], content: str
) -> Tensor:
    """Return a column that has a number for each token, (tokens,) float32; None in it becomes NaN.

    Args:
        is_valid: returns a mask of the values that are allowed.
        content: what the column must hold, for the message.

    Raises:
        ValueError: the column holds something else.
    """
    count = len(example["input_ids"])
    requirement = f"must be {count} {content}"
    try:
        values = np.asarray(example[name])
        numbers = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):  # text, or lists of different lengths
        raise ValueError(f"{name} {reprlib.repr(example[name])}: {requirement}") from None
    if values.dtype.kind in "US":
        raise ValueError(f"{name} {reprlib.repr(example[name])}: {requirement}")
    if numbers.shape != (count,):
        raise ValueError(f"{name} of shape {numbers.shape}: {requirement}")
    if not (valid := is_valid(numbers)).all():
        raise ValueError(f"{name} {numbers[~valid][0]:g}: {requirement}")
    return torch.from_numpy(numbers)


def loss_weights_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the weights of the tokens of a batch, (batch, seq) float32, or None if it has none."""
    return _floats(batch, "loss_weights")


def base_logp_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the base model's scores of a batch's tokens, (batch, seq) float32, or None if it has none."""
    return _floats(batch, "base_logp")


def _floats(batch: Mapping[str, Any], name: str) -> Tensor | None:
    values = batch.get(name)
    return values.view(torch.float32) if values is not None and values.dtype == torch.int32 else values


def _origins(example: Mapping[str, Any]) -> Tensor:
    """Return the (file, line) numbers of each sequence of an example, (sequences, 2) int64."""
    count = len(_sequence_lengths(example))
    if "origins" not in example:
        return torch.full((count, 2), -1)
    origins = np.array(example["origins"])
    if origins.shape != (count, 2) or origins.dtype.kind not in "iu":
        raise ValueError(
            f"origins {example['origins']!r}: must be {count} pair(s) of integers, the file and line number "
            "of each sequence; rename the column if it means something else"
        )
    return _int64(origins)


def _pad(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels padded on the right, each (batch, seq) int64."""
    ids = [_int64(example["input_ids"]) for example in examples]
    labels = [_int64(example["labels"]) for example in examples]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    )


def _restarting_positions(lengths: Sequence[int]) -> Tensor:
    """Return positions that restart at 0 for each sequence, (sum of lengths,) int64."""
    return torch.cat([torch.arange(length) for length in lengths])


def _int64(values: Any) -> Tensor:
    """Copy values to an int64 tensor."""
    # Copied because arrays of a memory-mapped file are read-only and tensors cannot be.
    return torch.from_numpy(np.array(values, dtype=np.int64))
