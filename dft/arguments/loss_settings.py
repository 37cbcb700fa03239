"""Arguments and settings of a model under which the loss would not be what it says."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

from dft.data.batches.collator import FlatCollator, PackedCollator

OF_THE_LOSS = ("fused_linear_cross_entropy", "cross_entropy")
"""Kernels of Liger that replace a model's loss; the second one replaces torch's own function, too."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names that configurations have for what the auxiliary loss of the router is multiplied by."""


def check_arguments(args: transformers.TrainingArguments) -> None:
    """Raises ValueError for arguments under which the loss would not be what it says."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {args.label_smoothing_factor:g}: DFT weights the probability of the "
            "one right token, which label smoothing has not; leave it at 0"
        )
    if not args.average_tokens_across_devices:
        raise ValueError(
            "--average_tokens_across_devices False would divide each rank's loss by its own token count; the "
            "DFT loss is divided by the tokens of the whole step"
        )
    batching = args.accelerator_config
    if batching.split_batches or batching.dispatch_batches or not batching.even_batches:
        raise ValueError(
            "--accelerator_config: split_batches, dispatch_batches and even_batches deal out other batches "
            "than those whose tokens are counted; leave them at their defaults"
        )
    parallel = args.parallelism_config
    if parallel is not None and max(parallel.cp_size, parallel.sp_size, parallel.tp_size) > 1:
        raise ValueError(
            "--parallelism_config: context, sequence and tensor parallelism cut up sequences or weights "
            "under the loss, which is not supported; leave it out"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process; start one process per GPU (deepspeed "
            "train_dft.py ... or torchrun), or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        raise ValueError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: must be random, sequential or "
            "group_by_length"
        )


def check_cache(args: transformers.TrainingArguments, data_collator: Any) -> None:
    """Raises ValueError where the cache of keys and values would undo the separation of sequences."""
    if args.use_cache and isinstance(data_collator, PackedCollator | FlatCollator):
        raise ValueError(
            "--use_cache True: with a cache, transformers takes several conversations in a row for one; it "
            "is of no use in training, leave it out"
        )


def layer_kernels(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """`liger_kernel_config` without the kernels that would bring a loss of their own.

    Raises:
        ValueError: one of these is asked for.
    """
    given = config or {}
    for name in OF_THE_LOSS:
        if given.get(name):
            raise ValueError(
                f"--liger_kernel_config: {name!r} is a loss of Liger's own, where this trainer computes the "
                "DFT loss; leave it out, the kernels of the layers are used all the same"
            )
    return {**given, **dict.fromkeys(OF_THE_LOSS, False)}


def router_coefficient(config: PretrainedConfig) -> float | None:
    """What a mixture of experts multiplies its auxiliary loss by; None where it computes none.

    Raises:
        ValueError: it computes one, and the configuration does not say what it counts.
    """
    given = config.to_dict()
    if not given.get("output_router_logits"):
        return None
    given |= given.get("ffn_config") or {}  # where DBRX keeps it
    for name in COEFFICIENTS:
        if given.get(name) is not None:
            return given[name]
    raise ValueError(
        "'output_router_logits' in the model's config.json asks for the auxiliary loss of a mixture of "
        f"experts, and none of {', '.join(COEFFICIENTS)} says what to multiply it by; add "
        "'router_aux_loss_coef', or set the former to false"
    )
