"""What `--plan True` prints."""

from typing import Any

from torch import nn

from dft.arguments import Arguments
from dft.training.distributed import is_launched, parallelism, schedule, sequence_parallel_size, world_size
from dft.training.memory import size
from dft.training.plan import HEADROOM, asked_setting, device_memory, nearest_that_fit, plan
from dft.training.throughput import GIB
from dft.weighing import objective_of


def plan_lines(arguments: Arguments, model: nn.Module, report: dict[str, Any]) -> list[str]:
    """Size, memory and steps of a run, and what would make it fit.

    Args:
        model: its shapes, on the meta device.
        report: of the data.
    """
    training, watch, train = arguments.training, arguments.watch, report["train"]
    ranks = watch.plan_world_size or world_size()
    memory = watch.plan_device_memory or device_memory(training.device, world_size() if is_launched() else 1)
    packed = "packing_density" in train
    longest = arguments.data.max_length if packed else train["length_percentiles"]["100"]
    fused = arguments.dft.fused_head != "off"
    anchored = objective_of(arguments.dft).kl_weight > 0
    held = sum(one.numel() for one in model.parameters()) * model.dtype.itemsize / GIB
    asked = asked_setting(model, training, ranks, beside=held if anchored else 0.0)
    share = train["supervised_tokens"] / train["tokens"]
    found = plan(model, training, asked, longest, fused, share)
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shared_by = parallelism(training)
    if ranks > 1 and shared_by == "single process":
        shared_by = "DDP"
    groups = max(1, ranks // sequence_parallel_size(training))
    steps = schedule(training, train["rows"], groups)
    per_step = asked.rows * asked.accumulation * groups
    parts = ", ".join(f"{name} {size(value)}" for name, value in found.parts.items())
    state = " (state of this optimizer not counted)" if found.unknown_optimizer else ""
    lines = [
        f"plan        {every / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained, {model.dtype} "
        f"weights; {ranks} x {training.device.type}, {shared_by}",
        f"data        {train['tokens']:,} tokens an epoch, {share:.1%} supervised; {steps} optimizer "
        f"steps of {per_step} rows, rows of up to {longest} tokens",
        f"memory      about {size(found.peak)} per device at the peak: {parts}{state}",
        "            not counted: the process itself, buffers of communication, fragments",
    ]
    if found.peak <= memory * HEADROOM:
        return [*lines, f"fits        yes: {found.peak / memory:.0%} of the {size(memory)} of a device"]
    lines.append(
        f"fits        no: {size(memory)} per device, of which {HEADROOM:.0%} are planned with; nearest flags:"
    )
    for other in nearest_that_fit(model, training, asked, longest, fused, memory, share):
        lines.append(f"            {' '.join(other.setting.changes)}: about {size(other.peak)}")
    if lines[-1].startswith("fits"):
        lines.append(
            "            none of batch, checkpointing, ZeRO-3 and offload is enough: more devices "
            "(--plan_world_size), --lora_r 16, or a shorter --max_length"
        )
    return lines
