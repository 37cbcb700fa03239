"""What `--plan True` prints."""

from typing import Any

import torch
import transformers
from torch import nn

from dft.arguments.objective import objective_of
from dft.arguments.parser import Arguments
from dft.loss.tiles import TILE_BYTES
from dft.ranks import count_optimizer_steps, data_parallel_size, describe_parallelism, is_launched, world_size
from dft.training.memory.estimate import estimate_logits, format_gib, has_4bit_weights
from dft.training.memory.plan import HEADROOM, closest_fitting_plans, device_memory, plan, requested_setting
from dft.training.parameters import GIB


def base_size(model: nn.Module, training: transformers.TrainingArguments, longest: int, fused: bool) -> float:
    """GiB of a frozen copy of the model, and of its logits."""
    weights = sum(one.numel() for one in model.parameters()) * model.dtype.itemsize / GIB
    tokens = training.per_device_train_batch_size * longest
    logits = estimate_logits(model, training, tokens) / 2  # no gradient
    tile = TILE_BYTES["cuda" if training.device.type == "cuda" else "cpu"] / GIB
    return weights + (min(logits, tile) if fused else logits)


def plan_lines(arguments: Arguments, model: nn.Module, report: dict[str, Any]) -> list[str]:
    """Size, memory and steps of a run, and what would make it fit.

    Args:
        model: its shapes, on the meta device.
        report: of the data.
    """
    training, watch, train = arguments.training, arguments.watch, report["train"]
    ranks = watch.plan_world_size or world_size()
    memory = watch.plan_device_memory or device_memory(training.device, world_size() if is_launched() else 1)
    longest = arguments.data.max_length if "packing_density" in train else train["length_percentiles"]["100"]
    fused = arguments.dft.fused_head != "off"
    anchored = objective_of(arguments.dft).kl_weight > 0
    beside = base_size(model, training, longest, fused) if anchored else 0.0
    asked = requested_setting(model, training, ranks, beside)
    share = train["supervised_tokens"] / train["tokens"]
    found = plan(model, training, asked, longest, fused, share)
    packed, weights = has_4bit_weights(model), str(model.dtype).removeprefix("torch.")
    every = sum(one.numel() * (2 if one.dtype == torch.uint8 else 1) for one in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    groups = data_parallel_size(training, ranks)
    steps = count_optimizer_steps(training, train["rows"], groups)
    per_step = asked.rows * asked.accumulation * groups
    parts = ", ".join(f"{name} {format_gib(value)}" for name, value in found.parts.items())
    state = " (state of this optimizer not counted)" if found.unknown_optimizer else ""
    lines = [
        f"plan        {every / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained, {weights} "
        f"weights{', those of linear layers in 4 bits' if packed else ''}; {ranks} x {training.device.type}, "
        f"{describe_parallelism(training, ranks)}",
        f"data        {train['tokens']:,} tokens an epoch, {100 * share:.1f} % supervised; {steps} optimizer "
        f"steps of {per_step} rows, rows of up to {longest} tokens",
        f"memory      about {format_gib(found.peak)} per device at the peak: {parts}{state}",
        "            these are not there all at once, and add up to more than the peak",
        "            not counted: the process itself, buffers of communication, fragments",
    ]
    if found.peak <= memory * HEADROOM:
        return [
            *lines,
            f"fits        yes: {100 * found.peak / memory:.0f} % of the {format_gib(memory)} of a device",
        ]
    lines.append(
        f"fits        no: {format_gib(memory)} per device, of which {100 * HEADROOM:.0f} % are planned "
        "with; nearest flags:"
    )
    for other in closest_fitting_plans(model, training, asked, longest, fused, memory, share):
        lines.append(f"            {' '.join(other.setting.changes)}: about {format_gib(other.peak)}")
    if lines[-1].startswith("fits"):
        lines.append(
            "            none of batch, checkpointing, ZeRO-3 and offload is enough: more devices "
            "(--plan_world_size), --lora_r 16, or a shorter --max_length"
        )
    return lines
