"""How much memory a run will take, and which flags it would fit with, before any weights are loaded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import psutil
import torch
import transformers
from torch import nn

from dft.ranks import sequence_parallel_size
from dft.training.memory.estimate import (
    MemoryLayout,
    autocasts,
    estimate_activations,
    estimate_logits,
    estimate_memory,
    has_4bit_weights,
    resolve_layout,
)
from dft.training.parameters import GIB

HEADROOM = 0.92
"""Of a device's memory: the rest goes to the context of CUDA, to buffers of NCCL, and to fragments."""


@dataclass(frozen=True)
class PlanSetting:
    """What may be changed to make a run fit.

    Attributes:
        layout: how weights, gradients and the optimizer's state lie on the devices.
        rows, accumulation: per device and optimizer step.
        checkpointed: whether activations are computed again.
        changes: the flags that make it of the run as it was asked for.
        extra_gib: GiB of what else lies on each device, as a frozen base model.
    """

    layout: MemoryLayout
    rows: int
    accumulation: int
    checkpointed: bool
    changes: tuple[str, ...] = ()
    extra_gib: float = 0.0


@dataclass(frozen=True)
class Plan:
    """GiB per device.

    Attributes:
        setting: planned for.
        parts: weights, gradients, optimizer, activations, and loss or logits.
        peak: most of them at a time.
        unknown_optimizer: whether the optimizer's state is not among them.
    """

    setting: PlanSetting
    parts: dict[str, float]
    peak: float
    unknown_optimizer: bool


def requested_setting(
    model: nn.Module, training: transformers.TrainingArguments, ranks: int, extra_gib: float = 0.0
) -> PlanSetting:
    """The run as its flags have it, on so many ranks."""
    return PlanSetting(
        replace(resolve_layout(model, training), ranks=ranks),
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        extra_gib=extra_gib,
    )


def plan(
    model: nn.Module,
    training: transformers.TrainingArguments,
    setting: PlanSetting,
    longest: int,
    fused: bool,
    share: float = 1.0,
) -> Plan:
    """The memory of a setting.

    All of weights, gradients and optimizer state are there when the second step begins its backward, and with
    them whatever the forward has kept; the gradient of a step is there from its first micro-batch on. The
    loss and the recomputation of a layer take their memory one after the other.

    Args:
        model: its shapes; on the meta device, too.
        longest: tokens of the longest row.
        fused: whether the loss is computed without logits.
        share: of the tokens that is supervised, on average.
    """
    tokens = -(-setting.rows * longest // sequence_parallel_size(training))
    known = estimate_memory(model, training, tokens, setting.layout, share)
    copies = 0.0
    if autocasts(model, training, setting.layout):  # and keeps what it has cast
        copies = sum(one.numel() for one in model.parameters() if one.is_floating_point()) * 2 / GIB
    kept, layer = (
        estimate_activations(model, training, setting.rows, tokens, checkpointed, setting.layout)
        for checkpointed in (setting.checkpointed, False)
    )
    layer /= model.config.get_text_config().num_hidden_layers
    loss = known.head if fused else estimate_logits(model, training, tokens)
    # With checkpointing `kept` holds one layer that is computed again, when the loss has gone.
    moments = [kept, kept - layer + loss] if setting.checkpointed else [kept + loss]
    optimizer = known.optimizer or 0.0
    parts = {
        "weights": known.weights,
        "gradients": known.gradients,
        "optimizer": optimizer,
        "activations": kept,
        "loss" if fused else "logits": loss,
    }
    if copies:
        parts["autocast"] = copies
    if setting.extra_gib:
        parts["base model"] = setting.extra_gib
    # Where nothing is accumulated a gradient takes the place of the activations it is made of.
    accumulates = setting.accumulation > 1 or setting.layout.stage > 0
    at_backward = max(moments) + known.gradients * accumulates
    # At the end of the backward, in the first layer.
    at_end = known.gradients + layer
    peak = known.weights + optimizer + copies + max(at_backward, at_end) + setting.extra_gib
    return Plan(setting, parts, peak, known.optimizer is None)


def equivalent_settings(
    asked: PlanSetting, training: transformers.TrainingArguments, is_cuda: bool, shardable: bool
) -> Iterator[PlanSetting]:
    """Settings that take the same optimizer steps, those with fewer changes first.

    Args:
        shardable: whether DeepSpeed could share the weights out.
    """
    batches = [(asked.rows, asked.accumulation)]
    rows, accumulation = batches[0]
    while rows % 2 == 0:
        rows, accumulation = rows // 2, accumulation * 2
        batches.append((rows, accumulation))
    if rows > 1:
        batches.append((1, asked.rows * asked.accumulation))
    layout = asked.layout
    layouts = [(layout, ())]
    if shardable and layout.stage < 3 and layout.ranks > 1:
        sharded = replace(layout, stage=3, itemsize=2 if training.bf16 or training.fp16 else layout.itemsize)
        layouts.append((sharded, ("--deepspeed ds_config/zero3.json",)))
    if shardable and is_cuda and not layout.optimizer_away:
        away = replace(layout, stage=3, optimizer_away=True, weights_away=True, itemsize=2)
        layouts.append((away, ("--deepspeed ds_config/zero3_offload.json",)))
    checkpoints = [(asked.checkpointed, ())]
    if not asked.checkpointed:
        checkpoints.append((True, ("--enable_gradient_checkpointing True",)))
    found = []
    for (lay, one), (checkpointed, two), (rows, accumulation) in product(layouts, checkpoints, batches):
        three = ()
        if rows != asked.rows:
            three = (f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}",)
        found.append(PlanSetting(lay, rows, accumulation, checkpointed, one + two + three, asked.extra_gib))
    yield from sorted(found, key=lambda one: (len(one.changes), -one.rows))


def closest_fitting_plans(
    model: nn.Module,
    training: transformers.TrainingArguments,
    asked: PlanSetting,
    longest: int,
    fused: bool,
    memory: float,
    share: float = 1.0,
) -> list[Plan]:
    """The settings with the fewest changes that fit into `memory` GiB; none where nothing does."""
    fitting: list[Plan] = []
    shardable = not training.fsdp and not has_4bit_weights(model)
    for setting in equivalent_settings(asked, training, training.device.type == "cuda", shardable):
        if fitting and len(setting.changes) > len(fitting[0].setting.changes):
            break
        one = plan(model, training, setting, longest, fused, share)
        same = [other for other in fitting if _kinds(other.setting) == _kinds(setting)]
        if one.peak <= memory * HEADROOM and not same:  # of smaller batches, the largest that fits
            fitting.append(one)
    return fitting


def _kinds(setting: PlanSetting) -> tuple[str, ...]:
    return tuple(change.split()[0] + change.split()[1] * ("zero3" in change) for change in setting.changes)


def device_memory(device: torch.device, ranks_here: int) -> float:
    """GiB that a rank may take: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().total / ranks_here / GIB
