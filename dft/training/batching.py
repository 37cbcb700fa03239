"""Choose the collator, check that a model keeps packed sequences separate, and describe batches."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import unwrap_peft_model

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.data.batches.dataset import Sequences
from dft.data.batches.sampler import WithBlank
from dft.errors import UserError
from dft.training.attention.choice import attention_of, layers_obstacle, reference_attention, runs_unpadded
from dft.training.attention.interface import VARLEN, layer_types
from dft.training.attention.windows import record_windows

Collator = PaddedCollator | PackedCollator | FlatCollator
COLUMNS = ("labels", "seq_lengths", "origins", "loss_weights", "base_logp")
"""Dataset columns that the collator and the loss read, regardless of what the model's forward accepts."""
NON_MODEL_KEYS = (
    "labels", "num_tokens", "loss_positions", "sequence_ids", "origins", "loss_weights", "base_logp",
    "share_positions", "share_counts",
)  # fmt: skip
"""Entries of a batch that the loss and its metrics use. They are not passed to the model."""
PROBE_LENGTHS = (7, 8)
"""Tokens of the two sequences of the isolation check; unequal, so that offsets do not cancel out."""
LARGEST_TOLERANCE = 5e-2
"""Tolerance for bfloat16, and for dtypes that `TOLERANCE` does not list."""
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: LARGEST_TOLERANCE}
"""Tolerated error of the logits of one token, relative to their norm."""


def choose_collator(
    model: PreTrainedModel, pad_token_id: int, packed: bool, longest_row: int | None = None
) -> Collator:
    """Return the collator that suits the attention of a model.

    With varlen or flash attention, every batch is one row without padding. Otherwise rows are padded on the
    right, and packed rows have positions that restart. Models that cannot keep the sequences of a row
    separate get padded rows with one sequence each.

    Args:
        model: model to train, with its attention implementation set.
        pad_token_id: any id of the vocabulary.
        packed: whether examples may hold several sequences.
        longest_row: number of tokens in the longest example; None if unknown.

    Raises:
        UserError: the examples are packed and the model would mix their sequences.
    """
    obstacle = packing_obstacle(model, longest_row)
    if obstacle is None:
        if runs_unpadded(model.config.get_text_config()):
            return FlatCollator()
        return PackedCollator(pad_token_id) if packed else PaddedCollator(pad_token_id)
    if packed:
        raise UserError(
            f"{type(model).__name__} cannot train on packed conversations: {obstacle}; use --packing False"
        )
    return PaddedCollator(pad_token_id)


def packing_obstacle(model: PreTrainedModel, longest_row: int | None = None) -> str | None:
    """Return the reason why a model cannot keep the sequences of a packed row separate, or None.

    Args:
        model: model to train, with its attention implementation set.
        longest_row: number of tokens in the longest row; None if unknown.
    """
    config = model.config.get_text_config()
    if (obstacle := layers_obstacle(config)) is not None:
        return obstacle
    model = unwrap_peft_model(model)  # adapters do not change what attention sees
    if isinstance(model, PreTrainedModel) and model._is_stateful:
        return "it carries a state from token to token, across the boundaries of conversations"
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        return "its forward takes no position_ids"
    if _reserves_positions(model):
        return "its positions do not begin at 0"
    unpadded = runs_unpadded(config)
    if unpadded:
        name = "varlen" if config._attn_implementation == VARLEN else "flash"
        if "chunked_attention" in layer_types(config):
            return f"{name} attention has no chunked attention"
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return f"its forward passes no arguments on to {name} attention"
    limit = exact_row_length(config)
    if limit is not None and (unpadded or longest_row is None or longest_row > limit):
        length = "" if longest_row is None else f", and the longest row has {longest_row}"
        return (
            "it scales attention by the position in the row instead of the conversation, so packing is exact "
            f"only in rows of up to {limit} tokens{length}"
        )
    return None


def _reserves_positions(model: nn.Module) -> bool:
    """Return whether a model has a learned position for padding, after which the others begin (RoBERTa)."""
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    )


def exact_row_length(config: PretrainedConfig) -> int | None:
    """Return the maximum row length at which a sequence's position in the row has no effect; None for any.

    Llama 4 scales the queries of its layers without rotary positions by the logarithm of the position in the
    row, from `floor_scale` tokens on. Everything else that transformers 5.23 derives from positions,
    including the chunks of chunked attention, restarts with each packed sequence.
    """
    settings = config.to_dict()
    if settings.get("attn_temperature_tuning") and 0 in (settings.get("no_rope_layers") or ()):
        return settings["floor_scale"] - 1
    return None


def describe_batching(collator: Any) -> str:
    """Describe how batches are formed, for reports."""
    return collator.batching if isinstance(collator, Collator) else "by the given collator"


def is_packed(*collections: Any) -> bool:
    """Return whether any of the datasets holds packed examples.

    Args:
        *collections: datasets, dictionaries of datasets, or None.
    """
    return any(_is_packed(collection) for collection in collections)


def _is_packed(dataset: Any) -> bool:
    if dataset is None:
        return False
    if isinstance(dataset, Sequences):
        return dataset.packed
    if isinstance(dataset, Mapping):
        return is_packed(*dataset.values())
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return "seq_lengths" in (dataset.column_names or ())
    # Reading the first example of a stream would consume it.
    if isinstance(dataset, IterableDataset) or not len(dataset):
        return False
    return "seq_lengths" in dataset[0]


def longest_row(*collections: Any) -> int | None:
    """Return the number of tokens in the longest example; None if that requires reading the examples.

    Args:
        *collections: datasets, dictionaries of datasets, or None.
    """
    longest = 0
    for collection in collections:
        length: int | None = 0
        if isinstance(collection, Mapping):
            length = longest_row(*collection.values())
        elif isinstance(collection, Sequences | datasets.Dataset):
            length = int(sequence_lengths(collection).max(initial=0))
        elif collection is not None:
            length = None
        if length is None:
            return None
        longest = max(longest, length)
    return longest


def padding_id(model: PreTrainedModel) -> int:
    """Return a padding token id. Any id works, since padding is neither attended to nor supervised."""
    token_id = model.config.get_text_config().pad_token_id
    return token_id if token_id is not None and token_id >= 0 else 0


def resolve_end_of_turn_ids(tokenizer: Any, token_ids: Sequence[int] | None) -> list[int]:
    """Return the token ids that end a turn.

    Args:
        tokenizer: processing class of the trainer, which may not be a tokenizer.
        token_ids: the ids, if the caller chose them; default: the end token of the tokenizer.
    """
    if token_ids is not None:
        return list(token_ids)
    end = tokenizer.eos_token_id if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    return [] if end is None else [end]


def dataset_files(dataset: Any) -> list[str]:
    """Return the names of a dataset's files in the order of the numbers in its `origins`.

    Args:
        dataset: a dataset, several by name, or None.
    """
    if isinstance(dataset, WithBlank):
        dataset = dataset.dataset
    if isinstance(dataset, Mapping):  # evaluation sets, which number the files of all of them
        dataset = next(iter(dataset.values()), None)
    files = getattr(dataset, "files", [])  # a library user's attribute may mean something else
    return files if isinstance(files, list) else []


def token_count(inputs: Mapping[str, Any]) -> Tensor:
    """Return the number of tokens in a batch excluding padding, as a scalar on its device."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    ids = inputs["input_ids"]
    count = inputs.get("num_tokens", ids.numel())
    # Copying a number to the device would synchronize in every micro-batch; filling it there does not.
    return count if isinstance(count, Tensor) else torch.full((), count, device=ids.device)


def attended_pairs(inputs: Mapping[str, Any]) -> Tensor:
    """Return the number of (token, attended token) pairs in a batch, as a scalar on its device.

    Counts causal attention over whole sequences and ignores sliding windows and chunks.
    """
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(-1)
        return (lengths * (lengths + 1) // 2).sum()
    if "position_ids" in inputs:
        pairs = inputs["position_ids"] + 1
        return (pairs * (inputs["sequence_ids"] >= 0) if "sequence_ids" in inputs else pairs).sum()
    rows, length = inputs["input_ids"].shape
    return torch.full((), rows * length * (length + 1) // 2, device=inputs["input_ids"].device)


def sequence_lengths(dataset: Any) -> np.ndarray:
    """Return the total number of tokens of each example, (size,), from Arrow without reading rows."""
    if isinstance(dataset, Sequences):
        return dataset.lengths
    if isinstance(dataset, datasets.Dataset):
        column = dataset.with_format("arrow")["input_ids"]
        return pc.list_value_length(column[:]).to_numpy()
    return np.array([len(dataset[index]["input_ids"]) for index in range(len(dataset))])


@torch.no_grad()
def check_isolation(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    collator: PackedCollator | FlatCollator,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Check that a sequence has the same logits in a packed row as on its own.

    Runs two short sequences in one row, and the second one alone, from its token ids and nothing else; with
    varlen attention, alone with the attention that transformers would choose. A token counts as different if
    its logits are off by more than rounding. Up to a quarter of the tokens may be different, since in a
    mixture of experts rounding can send a token to another expert; whereas a leak between sequences changes
    nearly all of them. Sliding windows are longer than these sequences: for varlen attention, which has no
    mask, the layers must pass theirs on. Does not consume random numbers. Under ZeRO-3 all ranks must call
    this.

    Args:
        forward: the model in evaluation mode, or a wrapper of it.
        model: unwrapped model, used for the error message and the vocabulary.
        collator: collator of the training.
        device: device of the batches.
        dtype: dtype the model computes in.

    Raises:
        UserError: the logits differ, or a window is not passed on.
    """
    config = model.config.get_text_config()
    first, second = PROBE_LENGTHS
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, first + second)
    pair = {"input_ids": tokens, "labels": tokens, "seq_lengths": [first, second]}
    alone = {"input_ids": tokens[first:], "labels": tokens[first:]}

    def logits(batch: Mapping[str, Any]) -> Tensor:  # (seq, vocab) of the first row
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in NON_MODEL_KEYS
        }
        return forward(**inputs).logits[0].cpu().double()  # not every device has float64

    is_varlen = config._attn_implementation == VARLEN
    with record_windows() as windows:
        packed = logits(collator([pair, alone]))[first : first + second]
    if missing := windows.missing(config):
        raise UserError(
            f"{type(model).__name__}: its layers do not pass their sliding window of {max(missing)} tokens "
            f"to varlen attention; {_remedy(collator)}"
        )
    with attention_of(model, reference_attention(model)) if is_varlen else nullcontext():
        expected = logits({"input_ids": torch.from_numpy(tokens[first:])[None]})
    error = (packed - expected).norm(dim=-1) / expected.norm(dim=-1)  # (second,)
    different = int((~(error <= TOLERANCE.get(dtype, LARGEST_TOLERANCE))).sum())  # NaN counts as a difference
    if different > second // 4:
        raise UserError(
            f"{type(model).__name__} with {config._attn_implementation} attention does not keep packed "
            f"conversations separate: {different} of {second} tokens have different logits in a packed row "
            f"than alone (relative error up to {error.max():.2g}); {_remedy(collator)}"
        )


def _remedy(collator: PackedCollator | FlatCollator) -> str:
    if isinstance(collator, FlatCollator):
        return "use --attn_implementation sdpa or, if that does not help, --packing False"
    return "use --packing False"
