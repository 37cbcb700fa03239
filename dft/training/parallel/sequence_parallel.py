"""Sequence parallelism: several ranks share each sequence (DeepSpeed Ulysses, arXiv 2309.14509).

The ranks of a group get the same batch, and each keeps one slice of its positions. Between the projections
of attention and attention itself, DeepSpeed exchanges slices with all heads for all positions of some heads,
so that attention sees complete sequences. All other layers, and the head, process only the rank's slice.

The loss of a rank is the sum over the targets of its slice. Ranks average it as they average losses of
different rows, so gradients and metrics are correct without special handling of groups. accelerate and
DeepSpeed's engine are therefore not informed of the groups: their batch adapter (accelerate's
`ParallelismConfig`) would slice everything in a batch along its second dimension, including the origins of
its tokens, and would remove the labels before the tokens of the optimizer step are counted.
"""

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from dft.data.batches.collator import FlatCollator, PaddedCollator, base_logp_of, loss_weights_of
from dft.data.batches.sampler import EpochSampler
from dft.errors import UserError
from dft.labels import IGNORE_INDEX, loss_positions
from dft.loss.objectives import Objective
from dft.ranks import init_cpu_deepspeed
from dft.training.attention.choice import HEAD_SIZES
from dft.training.attention.interface import VARLEN
from dft.training.batching import packing_obstacle
from dft.training.model.positions import LENGTH_DEPENDENT_ROPE, rope_types

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Entries of a flattened batch that describe where its sequences begin."""
SLICEABLE_KEYS = {
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    *BOUNDARIES,
    "loss_positions",
    "sequence_ids",
    "origins",
    "loss_weights",
    "base_logp",
    "share_positions",
    "share_counts",
}
"""Entries that a batch may have; `SequenceParallel.local_slice` can slice only these."""


def sequence_parallel_obstacle(model: PreTrainedModel, size: int) -> str | None:
    """Return the reason why `size` ranks cannot share the sequences of a model, or None."""
    if (obstacle := packing_obstacle(model)) is not None:
        return obstacle
    config = model.config.get_text_config()
    settings = config.to_dict()
    if config._attn_implementation == "eager":
        return "eager attention needs a mask of all pairs of tokens (use --attn_implementation sdpa)"
    # Windows and chunks are implemented by a mask, which each rank would create for its own slice. varlen
    # attention needs no mask for windows.
    layer_types = settings.get("layer_types") or ()
    is_varlen = config._attn_implementation == VARLEN
    local_layers = set(layer_types) - {"full_attention", *(["sliding_attention"] if is_varlen else [])}
    if local_layers or (settings.get("sliding_window") and not layer_types and not is_varlen):
        names = ", ".join(sorted(local_layers)) or "sliding"
        return f"it has layers that see only a part of the sequence ({names})"
    if config.num_attention_heads % size:
        return f"its {config.num_attention_heads} attention heads cannot be divided among {size} ranks"
    key_heads = settings.get("num_key_value_heads")
    if key_heads is None or settings.get("head_dim", 0) is None:  # DeepSpeed reads both
        return "its configuration has no num_key_value_heads or head_dim"
    if key_heads % size and size % key_heads:
        return f"its {key_heads} key-value heads cannot be divided among {size} ranks"
    if (obstacle := _heads_obstacle(model)) is not None:
        return obstacle
    length_dependent = rope_types(settings) & set(LENGTH_DEPENDENT_ROPE)
    if length_dependent:
        return (
            f"its rotary positions ({', '.join(sorted(length_dependent))}) depend on the length of the "
            "sequence, and a rank sees only a part of it"
        )
    if settings.get("output_router_logits"):
        return "the auxiliary loss of its router is not a sum over tokens"
    return None


def _heads_obstacle(model: PreTrainedModel) -> str | None:
    """Return the reason why DeepSpeed cannot exchange the heads of a model, or None.

    It assumes that all heads of queries, keys and values in all layers have the same size, and passes other
    arguments of attention on as they are.
    """
    settings = model.config.get_text_config().to_dict()
    layers = (settings.get("per_layer_config") or {}).values()
    numbers = (*HEAD_SIZES, "num_attention_heads", "num_key_value_heads")
    sizes = {settings[name] for name in HEAD_SIZES if settings.get(name)}
    if len(sizes) > 1 or any(name in layer for layer in layers for name in numbers):
        return "its heads differ between queries and values, or between layers"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its heads have attention sinks, and a rank computes only some of the heads"
    return None


class SequenceParallel:
    """Slices batches for this rank, and exchanges attention heads with the other ranks of its group.

    All ranks must create it at the same time.

    Args:
        model: model whose attention is wrapped.
        size: number of ranks that share a sequence.
        micro_batch_size: examples of a micro-batch, each a row unless varlen attention concatenates them.

    Attributes:
        size: number of ranks that share a sequence.
        rank: position of this rank in its group.

    Raises:
        UserError: the sequences of the model cannot be shared.
    """

    def __init__(self, model: PreTrainedModel, size: int, micro_batch_size: int) -> None:
        obstacle = sequence_parallel_obstacle(model, size)
        if obstacle is not None:
            raise UserError(
                f"--sequence_parallel_size {size}: {type(model).__name__}: {obstacle}; run without "
                "--sequence_parallel_size"
            )
        # Slow to import; needed only here.
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        attention = model.config.get_text_config()._attn_implementation
        if model.device.type == "cpu":
            init_cpu_deepspeed()  # does not compile anything
        elif not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(verbose=False)  # uses the existing process group
        groups = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=attention,
            sequence_parallel_size=size,
            micro_batch_size=1 if attention == VARLEN else micro_batch_size,
            disable_in_eval=True,
        )
        self.size = size
        self.rank = groups.get_sequence_parallel_rank()

    def local_slice(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's slice of its group's batch.

        Args:
            batch: batch of `PaddedCollator` or `FlatCollator`, (batch, seq); padded here to a multiple of the
                group size.

        Returns:
            input_ids, position_ids, labels, sequence_ids: (batch, seq / ranks). `labels` are shifted: each is
            the target of its own position, which may be the first one of the next rank, and so is each of
            the `loss_weights` and the `base_logp`, if the batch has any. num_tokens: number of tokens without
            padding. Of a batch of `FlatCollator` also the boundaries of all its sequences, with the padding
            as the last one.

        Raises:
            ValueError: the batch has unknown entries.
        """
        if not batch.keys() <= SLICEABLE_KEYS:
            raise ValueError(
                f"a batch holds {sorted(batch.keys() - SLICEABLE_KEYS)}, which --sequence_parallel_size "
                f"{self.size} cannot slice; use the trainer's own collator"
            )
        ids = batch["input_ids"]
        rows, width = ids.shape
        length = -(-width // self.size)
        padded_width = length * self.size
        own = slice(self.rank * length, (self.rank + 1) * length)

        def cut(tensor: Tensor, fill: float) -> Tensor:
            return F.pad(tensor, (0, padded_width - tensor.shape[1]), value=fill)[:, own].contiguous()

        labels = cut(batch["labels"][:, 1:], IGNORE_INDEX)
        sequence_ids = cut(batch["sequence_ids"], -1)
        others = {name: batch[name] for name in ("origins",) if name in batch}
        positions = torch.arange(padded_width, device=ids.device).expand(rows, padded_width)
        if "cu_seq_lens_q" in batch:
            positions = torch.cat([batch["position_ids"], positions[:, : padded_width - width]], dim=1)
            others |= _boundaries(batch, padded_width - width)
        if (weights := loss_weights_of(batch)) is not None:
            others["loss_weights"] = cut(weights[:, 1:], 1.0)
        if (scores := base_logp_of(batch)) is not None:
            others["base_logp"] = cut(scores[:, 1:], math.nan)
        return {
            "input_ids": cut(ids, 0),
            "position_ids": positions[:, own].contiguous(),
            "labels": labels,
            "loss_positions": self._loss_positions(batch, labels),
            "sequence_ids": sequence_ids,
            "num_tokens": (sequence_ids >= 0).sum(),
            **others,
        }

    def _loss_positions(self, batch: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return the positions of this rank's supervised labels, as the collator computed them, if it did."""
        if "share_counts" not in batch:
            return loss_positions(labels, shifted=True)
        counts = batch["share_counts"]
        start = sum(counts[: self.rank])
        return batch["share_positions"][start : start + counts[self.rank]]


def _boundaries(batch: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """Return the boundaries of a flattened batch, with its padding, if any, as one more sequence."""
    if not padding:
        return {name: batch[name] for name in BOUNDARIES}
    bounds, longest = batch["cu_seq_lens_q"], max(batch["max_length_q"], padding)
    bounds = torch.cat([bounds, bounds[-1:] + padding])
    return dict(zip(BOUNDARIES, (bounds, bounds, longest, longest), strict=True))


def check_shared_data(dataset: Any, objective: Objective) -> None:
    """Raise ValueError for a dataset or objective that sequence parallelism would silently get wrong."""
    if dataset is not None and not isinstance(dataset, Sized):
        raise ValueError(
            "sequence parallelism gives each batch to all ranks that share it, which is not possible with a "
            "dataset without a length; use one that has a length"
        )
    if objective.kl_weight > 0:
        raise ValueError(
            f"the objective {objective.name} scores whole sequences with the base model, but with sequence "
            "parallelism a rank has only a part of them; use another objective or no sequence parallelism"
        )


def resolve_parallel_collator(
    model: PreTrainedModel, pad_token_id: int, collator: Any, packed: bool, size: int
) -> PaddedCollator | FlatCollator:
    """Return the collator whose batches can be sliced: flattened for varlen attention, otherwise padded.

    Args:
        model: the model.
        pad_token_id: id to pad with.
        collator: collator that the caller chose, or None.
        packed: whether examples hold several sequences.
        size: number of ranks that share a sequence.

    Raises:
        ValueError: an unsuitable collator was chosen.
        UserError: the examples are packed, and the model's attention would mix their sequences.
    """
    attention = model.config.get_text_config()._attn_implementation
    suitable = FlatCollator if attention == VARLEN else PaddedCollator
    if collator is not None and not isinstance(collator, suitable):
        raise ValueError(
            f"sequence parallelism with {attention} attention can slice batches of {suitable.__name__} only; "
            "omit data_collator"
        )
    if suitable is FlatCollator:
        return FlatCollator(size)
    if packed:
        raise UserError(
            f"--sequence_parallel_size with --packing True: with {attention} attention the conversations of "
            "a row would attend to one another; use --attn_implementation varlen or --packing False"
        )
    return collator or PaddedCollator(pad_token_id, size)


class RepeatedBatchSampler(Sampler[int]):
    """Repeats each batch of a sampler for each rank that shares it: accelerate assigns batches in turn.

    Args:
        sampler: sampler of whole batches.
        batch: rows of a batch.
        ranks: number of ranks that share a batch.
    """

    def __init__(self, sampler: EpochSampler, batch: int, ranks: int) -> None:
        self.sampler = sampler
        self.batch = batch
        self.ranks = ranks

    def __len__(self) -> int:
        return len(self.sampler) * self.ranks

    def __iter__(self) -> Iterator[int]:
        indices: list[int] = []
        for index in self.sampler:
            indices.append(index)
            if len(indices) == self.batch:
                for _ in range(self.ranks):
                    yield from indices
                indices = []
        assert not indices, "the sampler gives whole batches"
