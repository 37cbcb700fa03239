"""Checks for arguments and model settings that would change the meaning of the loss."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

from dft.data.batches.collator import FlatCollator, PackedCollator
from dft.program import launch_command

LOSS_KERNELS = ("fused_linear_cross_entropy", "cross_entropy")
"""Liger kernels that replace the loss of the model; the second also replaces the function of torch."""
ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of the coefficient of the router's auxiliary loss in model configurations."""


def check_loss_settings(args: transformers.TrainingArguments) -> None:
    """Raise ValueError for arguments that would change the meaning of the loss."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {args.label_smoothing_factor:g}: DFT weights a token by the "
            "probability of its single target, which label smoothing replaces by a distribution; set it to 0"
        )
    if not args.average_tokens_across_devices:
        raise ValueError(
            "--average_tokens_across_devices False would divide the loss of each rank by its own number of "
            "tokens; the DFT loss is divided by the tokens of the whole optimizer step; leave it at True"
        )
    batching = args.accelerator_config
    if batching.split_batches or batching.dispatch_batches or not batching.even_batches:
        raise ValueError(
            "--accelerator_config: split_batches, dispatch_batches and even_batches change which rank gets "
            "which rows after the tokens are counted; leave them at their defaults"
        )
    parallel = args.parallelism_config
    if parallel is not None and max(parallel.cp_size, parallel.sp_size, parallel.tp_size) > 1:
        raise ValueError(
            "--parallelism_config: context, sequence and tensor parallelism of accelerate are not supported; "
            "leave it out (for long sequences use --sequence_parallel_size)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process; start one process per GPU "
            f"({launch_command('deepspeed')} ... or torchrun), or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        raise ValueError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: must be random, sequential or "
            "group_by_length"
        )


def check_cache(args: transformers.TrainingArguments, data_collator: Any) -> None:
    """Raise ValueError if the key-value cache would let packed sequences attend to one another."""
    if args.use_cache and isinstance(data_collator, PackedCollator | FlatCollator):
        raise ValueError(
            "--use_cache True: with a cache, transformers treats the packed conversations of a row as one; "
            "leave it out, training does not need a cache"
        )


def layer_kernels(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `liger_kernel_config` with the loss kernels disabled.

    Raises:
        ValueError: a loss kernel is explicitly enabled.
    """
    kernels = config or {}
    for name in LOSS_KERNELS:
        if kernels.get(name):
            raise ValueError(
                f"--liger_kernel_config: {name!r} replaces the loss of the model, but this trainer computes "
                "the DFT loss; leave it out, the kernels of the layers are used anyway"
            )
    return {**kernels, **dict.fromkeys(LOSS_KERNELS, False)}


def router_coefficient(config: PretrainedConfig) -> float | None:
    """Return the coefficient of the router's auxiliary loss, or None if the model computes no such loss.

    Raises:
        ValueError: the model computes an auxiliary loss, but its configuration has no coefficient.
    """
    values = config.to_dict()
    if not values.get("output_router_logits"):
        return None
    values |= values.get("ffn_config") or {}  # the section of DBRX
    for name in ROUTER_COEFFICIENTS:
        if values.get(name) is not None:
            return values[name]
    raise ValueError(
        "'output_router_logits' in the model's config.json enables the auxiliary loss of a mixture of "
        f"experts, but none of {', '.join(ROUTER_COEFFICIENTS)} is set; add 'router_aux_loss_coef', or set "
        "'output_router_logits' to false"
    )
