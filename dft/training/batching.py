"""Batches: which collator fits a model, whether it keeps packed conversations apart, what they hold."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import is_flash_attention_requested

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.data.batches.dataset import Sequences
from dft.data.batches.sampler import WithBlank
from dft.errors import UserError

Collator = PaddedCollator | PackedCollator | FlatCollator
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers that see a sequence through the attention mask alone."""
NON_MODEL_KEYS = ("labels", "num_tokens", "loss_positions", "sequence_ids", "origins")
"""What a batch holds for the loss and its metrics, not for the model."""
PROBE = 8
"""Tokens of each of the two sequences that the check packs."""
COARSEST = 5e-2
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: COARSEST}
"""How far the logits of one token may be off, as a share of their own norm."""


def choose_collator(model: nn.Module, pad_token_id: int, packed: bool) -> Collator:
    """The collator that suits the model's attention.

    Flash attention takes any batch as one row without padding. Other attention gets rows padded on the right,
    packed ones with positions that restart. A model that does not tell sequences of a row apart is padded.

    Args:
        model: as it will be trained, with its attention implementation chosen.
        pad_token_id: any id of the vocabulary.
        packed: whether examples may hold several sequences.

    Raises:
        UserError: packed examples for a model that would let their sequences see each other.
    """
    obstacle = packing_obstacle(model)
    flash = is_flash_attention_requested(model.config.get_text_config())
    if obstacle is None:
        if flash:
            return FlatCollator()
        return PackedCollator(pad_token_id) if packed else PaddedCollator(pad_token_id)
    if packed:
        raise UserError(
            f"{type(model).__name__} cannot train on packed conversations: {obstacle}; use --packing False"
        )
    return PaddedCollator(pad_token_id)


def packing_obstacle(model: nn.Module) -> str | None:
    """What keeps a model from telling apart several sequences in a row, None if nothing is known to."""
    config = model.config.get_text_config()
    # Not every configuration names the types of its layers.
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - ATTENTION:
        return f"it has layers that are not plain attention ({', '.join(sorted(layers - ATTENTION))})"
    model = unwrap_peft_model(model)  # adapters change nothing of what attention sees
    if isinstance(model, PreTrainedModel) and model._is_stateful:
        return "it carries a state from token to token, across the boundaries of conversations"
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        return "its forward takes no position_ids"
    if is_flash_attention_requested(config):
        if "chunked_attention" in layers:
            return "flash attention has no chunked attention"
        if all(one.kind != inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            return "its forward hands no arguments on to flash attention"
    return None


def describe_batching(collator: Any) -> str:
    """How batches are made, in words for a report."""
    return collator.batching if isinstance(collator, Collator) else "by the given collator"


def is_packed(*collections: Any) -> bool:
    """Whether any of these datasets (or None, or a dictionary of datasets) holds packed examples."""
    return any(_is_packed(one) for one in collections)


def _is_packed(dataset: Any) -> bool:
    if dataset is None:
        return False
    if isinstance(dataset, Sequences):
        return dataset.packed
    if isinstance(dataset, Mapping):
        return is_packed(*dataset.values())
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return "seq_lengths" in (dataset.column_names or ())
    # What only streams cannot be looked into without taking from it.
    if isinstance(dataset, IterableDataset) or not len(dataset):
        return False
    return "seq_lengths" in dataset[0]


def padding_id(model: nn.Module) -> int:
    """A token to pad with. Any will do, since padding is neither attended to nor supervised."""
    wanted = model.config.get_text_config().pad_token_id
    return wanted if wanted is not None and wanted >= 0 else 0


def resolve_end_of_turn_ids(tokenizer: Any, given: Sequence[int] | None) -> list[int]:
    """Tokens that end a turn: those given, else the tokenizer's end token, if there is a tokenizer."""
    if given is not None:
        return list(given)
    ends = tokenizer.eos_token_id if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    return [] if ends is None else [ends]


def dataset_files(dataset: Any) -> list[str]:
    """Names of the files that the examples of a dataset are from, as its `origins` number them."""
    if isinstance(dataset, WithBlank):
        dataset = dataset.dataset
    files = getattr(dataset, "files", [])  # of a library user it may mean another thing
    return files if isinstance(files, list) else []


def token_count(inputs: Mapping[str, Tensor | int]) -> Tensor:
    """How many tokens of a batch are not padding, a scalar on its device."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    ids = inputs["input_ids"]
    count = inputs.get("num_tokens", ids.numel())
    # Filled on the device: to copy a number there would wait for it, in every micro-batch.
    return count if isinstance(count, Tensor) else torch.full((), count, device=ids.device)


def attended_pairs(inputs: Mapping[str, Tensor | int]) -> Tensor:
    """How many pairs of a token and one that it may attend to a batch has, a scalar on its device.

    Of whole sequences under causal attention; windows and chunks of attention, which see less, are not known.
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
    """(size,) tokens of each example, all its sequences; where it lies in Arrow, without reading them."""
    if isinstance(dataset, Sequences):
        return dataset.lengths
    if isinstance(dataset, datasets.Dataset):
        column = dataset.with_format("arrow")["input_ids"]
        return pc.list_value_length(column[:]).to_numpy()
    return np.array([len(dataset[index]["input_ids"]) for index in range(len(dataset))])


@torch.no_grad()
def check_isolation(
    forward: Callable[..., Any],
    model: nn.Module,
    collator: PackedCollator | FlatCollator,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Runs two short sequences in one row, and the second alone: its logits must be the same.

    A token counts as different if its logits are off by more than rounding. Up to a quarter of them may be:
    in a mixture of experts, rounding can send a token to another expert. A conversation in view that should
    not be moves nearly all. Consumes no random numbers. Under ZeRO-3 all ranks must take part.

    Args:
        forward: the model in evaluation mode, or what wraps it.
        model: names the class, the vocabulary and the attention.
        collator: as in training.
        device: where batches go.
        dtype: in which the model computes.

    Raises:
        UserError: they differ.
    """
    config = model.config.get_text_config()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 2 * PROBE)
    pair = {"input_ids": tokens, "labels": tokens, "seq_lengths": [PROBE, PROBE]}
    alone = {"input_ids": tokens[PROBE:], "labels": tokens[PROBE:]}

    def logits(*examples: Mapping[str, Any]) -> Tensor:  # (seq, vocab) of the first row
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in collator(examples).items()
            if name not in NON_MODEL_KEYS
        }
        return forward(**inputs).logits[0].double()

    packed = logits(pair, alone)[PROBE : 2 * PROBE]
    expected = logits(alone)
    off = (packed - expected).norm(dim=-1) / expected.norm(dim=-1)  # (PROBE,)
    # Not below the bound rather than above it: NaN must count.
    different = int((~(off <= TOLERANCE.get(dtype, COARSEST))).sum())
    if different > PROBE // 4:
        raise UserError(
            f"{type(model).__name__} with {config._attn_implementation} attention does not keep packed "
            f"conversations apart: beside another one, {different} of {PROBE} tokens get other logits "
            f"(off by up to {off.max():.2g} of their norm); {_remedy(collator)}"
        )


def _remedy(collator: PackedCollator | FlatCollator) -> str:
    if isinstance(collator, FlatCollator):
        return "use --attn_implementation sdpa or, if that does not help, --packing False"
    return "use --packing False"
