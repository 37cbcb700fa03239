"""Sequence parallelism: several ranks share each sequence (DeepSpeed Ulysses, arXiv 2309.14509).

The ranks of a group get the same batch and keep a stretch of its positions each. Between attention's
projections and attention itself DeepSpeed exchanges stretches of all heads for all positions of some heads,
so that attention sees whole sequences; every other layer, and the head, works on a rank's own stretch.

A rank's loss is the sum over the targets of its stretch, which ranks average as they average those of other
rows: no gradient and no metric needs to know which of the two a rank stands for. That is why neither
accelerate nor DeepSpeed's engine is told. Their adapter of batches (accelerate's `ParallelismConfig`) would
cut everything a batch holds along its second dimension, also what says where its tokens are from, and takes
the labels away before anybody has counted the tokens of the step.
"""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler

from dft.data.batches.collator import PaddedCollator
from dft.errors import UserError
from dft.labels import IGNORE_INDEX
from dft.loss.objectives import Objective
from dft.ranks import init_cpu_deepspeed
from dft.training.batching import packing_obstacle
from dft.training.model.positions import LENGTH_DEPENDENT_ROPE, rope_types

CUT = {"input_ids", "labels", "attention_mask", "loss_positions", "sequence_ids", "origins"}
"""What a batch may hold: of anything else it is not known how to cut it."""


def sequence_parallel_obstacle(model: nn.Module, size: int) -> str | None:
    """What keeps the sequences of a model from being shared by `size` ranks, None if nothing is known to."""
    if (obstacle := packing_obstacle(model)) is not None:
        return obstacle
    config = model.config.get_text_config()
    given = config.to_dict()
    attention = config._attn_implementation
    if attention == "eager":
        return "eager attention needs a mask of all pairs; use --attn_implementation sdpa"
    narrow = set(given.get("layer_types") or ()) - {"full_attention"}
    # Windows and chunks are cut by a mask, which each rank would make for its own stretch.
    if narrow or (given.get("sliding_window") and not given.get("layer_types")):
        return f"it has layers that see a part of the sequence ({', '.join(sorted(narrow)) or 'sliding'})"
    if config.num_attention_heads % size:
        return f"its {config.num_attention_heads} attention heads cannot be shared by {size} ranks"
    keys = given.get("num_key_value_heads")
    if keys is None or given.get("head_dim", 0) is None:  # which DeepSpeed reads
        return "its configuration says nothing of num_key_value_heads or head_dim"
    if keys % size and size % keys:
        return f"its {keys} key-value heads cannot be shared by {size} ranks"
    moving = rope_types(given) & set(LENGTH_DEPENDENT_ROPE)
    if moving:
        return (
            f"its rotary positions ({', '.join(sorted(moving))}) depend on how long the sequence is, and a "
            "rank sees a part of it"
        )
    if given.get("output_router_logits"):
        return "the auxiliary loss of its router is no sum over tokens"
    return None


class SequenceParallel:
    """This rank's part in the sequences of its group.

    Attributes:
        size: ranks that share a sequence.
        rank: of this one among them.
    """

    def __init__(self, model: nn.Module, size: int, micro_batch_size: int) -> None:
        """Puts the exchange around the model's attention. All ranks must take part.

        Raises:
            UserError: the model's sequences cannot be cut up.
        """
        obstacle = sequence_parallel_obstacle(model, size)
        if obstacle is not None:
            raise UserError(f"--sequence_parallel_size {size}: {type(model).__name__}: {obstacle}")
        # slow to import, and only needed here
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        if model.device.type == "cpu":
            init_cpu_deepspeed()  # compiles nothing
        elif not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(verbose=False)  # takes over the process group that is there
        groups = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=model.config._attn_implementation,
            sequence_parallel_size=size,
            micro_batch_size=micro_batch_size,
            disable_in_eval=True,
        )
        self.size = size
        self.rank = groups.get_sequence_parallel_rank()

    def part(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's stretch of a batch that its whole group has.

        Args:
            batch: as `PaddedCollator` makes it, (batch, seq); padded here to a multiple of the ranks.

        Returns:
            input_ids, position_ids, labels, sequence_ids (batch, seq / ranks), `labels` shifted: each is the
            target of its own position, which may be the first one of the next rank. num_tokens: how many are
            not padding.
        """
        if not batch.keys() <= CUT:
            raise ValueError(
                f"a batch holds {sorted(batch.keys() - CUT)}, and --sequence_parallel_size {self.size} "
                "cannot cut that; use the trainer's own collator"
            )
        ids = batch["input_ids"]
        rows, width = ids.shape
        stretch = -(-width // self.size)
        whole = stretch * self.size
        here = slice(self.rank * stretch, (self.rank + 1) * stretch)

        def cut(tensor: Tensor, fill: int) -> Tensor:
            return F.pad(tensor, (0, whole - tensor.shape[1]), value=fill)[:, here].contiguous()

        labels = cut(batch["labels"][:, 1:], IGNORE_INDEX)
        positions = torch.arange(whole, device=ids.device).expand(rows, whole)
        return {
            "input_ids": cut(ids, 0),
            "position_ids": positions[:, here].contiguous(),
            "labels": labels,
            "loss_positions": (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
            "sequence_ids": cut(batch["sequence_ids"], -1),
            "num_tokens": cut(batch["attention_mask"], 0).sum(),
            **{name: batch[name] for name in ("origins",) if name in batch},
        }


def check_sequence_parallel(dataset: Any, objective: Objective) -> None:
    """Raises ValueError for what would be wrong without a word where ranks share sequences."""
    if dataset is not None and not isinstance(dataset, Sized):
        raise ValueError(
            "sequence parallelism deals each batch to all ranks that share it, which a dataset without a "
            "length cannot do; use one that has a length"
        )
    if objective.kl_weight > 0:
        raise ValueError(
            f"the objective {objective.name} scores whole sequences with the base model, of which "
            "sequence parallelism leaves a rank a part; leave one of them out"
        )


def resolve_parallel_collator(pad_token_id: int, given: Any) -> PaddedCollator:
    """Batches as they can be cut: also for flash attention, which would take one row without padding."""
    if given is not None and not isinstance(given, PaddedCollator):
        raise ValueError(
            "sequence parallelism cuts the batches of PaddedCollator alone; leave data_collator out"
        )
    return given or PaddedCollator(pad_token_id)


class RepeatedBatchSampler(Sampler[int]):
    """Another sampler's batches, each as often as ranks share it: accelerate deals them out one by one."""

    def __init__(self, sampler: Sampler[int], batch: int, ranks: int) -> None:
        self.sampler = sampler
        self.batch = batch
        self.ranks = ranks

    def __len__(self) -> int:
        return len(self.sampler) * self.ranks

    def __iter__(self) -> Iterator[int]:
        taken: list[int] = []
        for index in self.sampler:
            taken.append(index)
            if len(taken) == self.batch:
                for _ in range(self.ranks):
                    yield from taken
                taken = []
        assert not taken, "the sampler gives whole batches"
