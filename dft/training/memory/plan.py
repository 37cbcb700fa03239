"""Plan the memory of a run before any weights are loaded, and find flags that make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import psutil
import torch
import transformers
from transformers import PreTrainedModel

from dft.arguments.training import needs_whole_matrices
from dft.ranks import sequence_parallel_size
from dft.training.memory.batch_tokens import BatchTokens
from dft.training.memory.estimate import (
    MemoryLayout,
    autocasts,
    averages_weights,
    estimate_activations,
    estimate_logits,
    estimate_memory,
    has_4bit_weights,
    resolve_layout,
)
from dft.training.parameters import GIB

HEADROOM = 0.92
"""Share of a device's memory that is planned with.

The rest is left to the CUDA context, NCCL buffers and fragmentation.
"""


@dataclass(frozen=True)
class PlanSetting:
    """Settings that may be changed to make a run fit.

    Attributes:
        layout: distribution of weights, gradients and optimizer state over the devices.
        rows: number of rows per micro-batch on each device.
        accumulation: number of micro-batches per optimizer step.
        checkpointed: whether activations are recomputed.
        changes: flags that turn the requested run into this one.
        extra_gib: GiB of anything else on each device, such as a frozen base model.
    """

    layout: MemoryLayout
    rows: int
    accumulation: int
    checkpointed: bool
    changes: tuple[str, ...] = ()
    extra_gib: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Memory of a device under a setting, in GiB.

    Attributes:
        setting: the setting.
        parts: sizes by name: weights, gradients, optimizer, activations, loss or logits, and others if any.
        peak: maximum memory in use at any time.
        unknown_optimizer: whether the optimizer's state is unknown and not counted.
    """

    setting: PlanSetting
    parts: dict[str, float]
    peak: float
    unknown_optimizer: bool


def requested_setting(
    model: PreTrainedModel, training: transformers.TrainingArguments, ranks: int, extra_gib: float = 0.0
) -> PlanSetting:
    """Return the setting requested by the flags, for a number of ranks."""
    return PlanSetting(
        replace(resolve_layout(model, training), ranks=ranks),
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        extra_gib=extra_gib,
    )


def plan(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    setting: PlanSetting,
    batch_tokens: BatchTokens,
    fused: bool,
    supervised_share: float = 1.0,
) -> Plan:
    """Plan the memory of a setting.

    The peak is in the second optimizer step. Weights, optimizer state and, if micro-batches are accumulated,
    gradients are always allocated; the forward pass adds activations. The loss and the recomputation of a
    layer use memory one after the other.

    Args:
        model: the model, possibly on the meta device.
        training: arguments of the run.
        setting: setting to plan for.
        batch_tokens: number of tokens in the largest micro-batch, by its number of rows.
        fused: whether the loss is computed without logits.
        supervised_share: average share of the tokens that are supervised.
    """
    tokens = -(-batch_tokens(setting.rows) // sequence_parallel_size(training))
    estimate = estimate_memory(model, training, tokens, setting.layout, supervised_share)
    autocast = 0.0
    if autocasts(model, training, setting.layout):  # autocast caches the weights that it has cast
        elements = (parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())
        autocast = sum(elements) * 2 / GIB
    activations, all_layers = (
        estimate_activations(model, training, setting.rows, tokens, checkpointed, setting.layout)
        for checkpointed in (setting.checkpointed, False)
    )
    layer = all_layers / model.config.get_text_config().num_hidden_layers
    loss = estimate.head if fused else estimate_logits(model, training, tokens)
    optimizer = estimate.optimizer or 0.0
    parts = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": optimizer,
        "activations": activations,
        "loss" if fused else "logits": loss,
    }
    if estimate.average:
        parts["average"] = estimate.average
    if autocast:
        parts["autocast"] = autocast
    if setting.extra_gib:
        parts["base model"] = setting.extra_gib
    # With checkpointing, `activations` include one recomputed layer, which comes after the loss.
    moments = [activations, activations - layer + loss] if setting.checkpointed else [activations + loss]
    # Without accumulation, gradients replace the activations that they are computed from.
    accumulates = setting.accumulation > 1 or setting.layout.stage > 0
    start_of_backward = max(moments) + estimate.gradients * accumulates
    end_of_backward = estimate.gradients + layer
    held = estimate.weights + optimizer + estimate.average + autocast + setting.extra_gib
    return Plan(setting, parts, held + max(start_of_backward, end_of_backward), estimate.optimizer is None)


def equivalent_settings(
    requested: PlanSetting, training: transformers.TrainingArguments, is_cuda: bool, shardable: bool
) -> Iterator[PlanSetting]:
    """Yield settings with the same optimizer steps, those with fewer changed flags first.

    Args:
        requested: setting requested by the flags.
        training: arguments of the run.
        is_cuda: whether the run is on GPUs.
        shardable: whether DeepSpeed could shard the weights.
    """
    batches = [(requested.rows, requested.accumulation)]
    rows, accumulation = batches[0]
    while rows % 2 == 0:
        rows, accumulation = rows // 2, accumulation * 2
        batches.append((rows, accumulation))
    if rows > 1:
        batches.append((1, requested.rows * requested.accumulation))
    layout = requested.layout
    layouts: list[tuple[MemoryLayout, tuple[str, ...]]] = [(layout, ())]
    if shardable and layout.stage < 3 and layout.ranks > 1:
        sharded = replace(layout, stage=3, itemsize=2 if training.bf16 or training.fp16 else layout.itemsize)
        layouts.append((sharded, ("--deepspeed zero3",)))
    # The average of offloaded weights is not supported.
    if shardable and is_cuda and not layout.optimizer_offloaded and not averages_weights(training):
        offloaded = replace(layout, stage=3, optimizer_offloaded=True, weights_offloaded=True, itemsize=2)
        layouts.append((offloaded, ("--deepspeed zero3_offload",)))
    checkpointing: list[tuple[bool, tuple[str, ...]]] = [(requested.checkpointed, ())]
    if not requested.checkpointed:
        checkpointing.append((True, ("--enable_gradient_checkpointing True",)))
    settings = []
    for (new_layout, layout_flags), (checkpointed, checkpointing_flags), (rows, accumulation) in product(
        layouts, checkpointing, batches
    ):
        batch_flags: tuple[str, ...] = ()
        if rows != requested.rows:
            flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}"
            batch_flags = (flags,)
        changes = layout_flags + checkpointing_flags + batch_flags
        settings.append(
            PlanSetting(new_layout, rows, accumulation, checkpointed, changes, requested.extra_gib)
        )
    yield from sorted(settings, key=lambda setting: (len(setting.changes), -setting.rows))


def closest_fitting_plans(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    requested: PlanSetting,
    batch_tokens: BatchTokens,
    fused: bool,
    memory: float,
    supervised_share: float = 1.0,
) -> list[Plan]:
    """Return the plans that fit a device with the fewest changed flags; empty if none fits.

    Args:
        model: the model, possibly on the meta device.
        training: arguments of the run.
        requested: setting requested by the flags.
        batch_tokens: number of tokens in the largest micro-batch, by its number of rows.
        fused: whether the loss is computed without logits.
        memory: memory of the device in GiB.
        supervised_share: average share of the tokens that are supervised.
    """
    fitting: list[Plan] = []
    shardable = not (training.fsdp or has_4bit_weights(model) or needs_whole_matrices(training))
    for setting in equivalent_settings(requested, training, training.device.type == "cuda", shardable):
        if fitting and len(setting.changes) > len(fitting[0].setting.changes):
            break
        # Settings come with larger batches first: keep the largest batch that fits for each kind of change.
        if any(_kinds_of_change(accepted.setting) == _kinds_of_change(setting) for accepted in fitting):
            continue
        candidate = plan(model, training, setting, batch_tokens, fused, supervised_share)
        if candidate.peak <= memory * HEADROOM:
            fitting.append(candidate)
    return fitting


def _kinds_of_change(setting: PlanSetting) -> tuple[str, ...]:
    """Return the names of the changed flags, and for --deepspeed the file as well."""
    return tuple(change.split()[0] + change.split()[1] * ("zero3" in change) for change in setting.changes)


def device_memory(device: torch.device, local_ranks: int) -> float:
    """Return the memory available to a rank in GiB: its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().total / local_ranks / GIB
