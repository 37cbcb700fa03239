"""The lines that `--plan True` prints: size, data, memory, and settings that fit."""

from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from dft.arguments.objective import build_objective
from dft.arguments.parser import Arguments
from dft.console import wrap
from dft.data.preparing.prepare import PreparedData
from dft.loss.tiles import tile_limit
from dft.ranks import count_optimizer_steps, data_parallel_size, describe_parallelism, is_launched, world_size
from dft.training.base_scores.plan import ScoringPlan, plan_scoring
from dft.training.memory.batch_tokens import full_rows, largest_micro_batch
from dft.training.memory.estimate import (
    MemoryLayout,
    estimate_logits,
    format_gib,
    has_4bit_weights,
    product_dtype,
    resolve_layout,
)
from dft.training.memory.plan import (
    HEADROOM,
    Plan,
    closest_fitting_plans,
    device_memory,
    plan,
    requested_setting,
)
from dft.training.parameters import GIB


def base_model_gib(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    layout: MemoryLayout,
    tokens: int,
    fused: bool,
) -> float:
    """Return the memory of a frozen copy of the model and its logits, in GiB.

    Args:
        model: the model, possibly on the meta device.
        training: the training arguments.
        layout: distribution over the devices.
        tokens: number of tokens in the largest micro-batch.
        fused: whether the fused head computes the loss; it holds only one tile of logits at a time.
    """
    weights = sum(parameter.numel() for parameter in model.parameters()) * model.dtype.itemsize / GIB
    logits = estimate_logits(model, training, tokens) / 2  # no gradient
    tile = tile_limit(product_dtype(model, training, layout), layout.device) / GIB
    return weights + (min(logits, tile) if fused else logits)


def plan_lines(
    arguments: Arguments, model: PreTrainedModel, report: dict[str, Any], data: PreparedData | None = None
) -> list[str]:
    """Return lines on the size, data and memory of a run, and on the closest settings that fit.

    Args:
        arguments: the parsed flags.
        model: the model on the meta device.
        report: `PreparedData.report`.
        data: the prepared data; None plans for rows that all have the longest length, without base scores.
    """
    training, watch, train = arguments.training, arguments.watch, report["train"]
    ranks = watch.plan_world_size or world_size()
    memory = watch.plan_device_memory or device_memory(training.device, world_size() if is_launched() else 1)
    longest = arguments.data.max_length if "packing_density" in train else train["length_percentiles"]["100"]
    batch_tokens = full_rows(longest)
    if data is not None:
        batch_tokens = cache(largest_micro_batch(model, training, data.datasets["train"], ranks))
    fused = arguments.dft.fused_head != "off"
    has_base_model = build_objective(arguments.dft).kl_weight > 0
    layout = resolve_layout(model, training)
    tokens = batch_tokens(training.per_device_train_batch_size)
    extra = base_model_gib(model, training, layout, tokens, fused) if has_base_model else 0.0
    setting = requested_setting(model, training, ranks, extra)
    share = train["supervised_tokens"] / train["tokens"]
    requested = plan(model, training, setting, batch_tokens, fused, share)
    groups = data_parallel_size(training, ranks)
    parts = ", ".join(f"{name} {format_gib(value)}" for name, value in requested.parts.items())
    state = " (the state of this optimizer is not included)" if requested.unknown_optimizer else ""
    lines = [
        f"plan        {_model_size(model)}; {ranks} x {training.device.type}, "
        f"{describe_parallelism(training, ranks)}",
        f"data        {train['tokens']:,} tokens per epoch, {100 * share:.1f} % supervised; "
        f"{count_optimizer_steps(training, train['rows'], groups)} optimizer steps of "
        f"{setting.rows * setting.accumulation * groups} rows, up to {longest:,} tokens per row "
        f"and {tokens:,} per micro-batch",
        f"memory      about {format_gib(requested.peak)} per device at the peak: {parts}{state}",
        "            these parts are not all in use at the same time, so their sum exceeds the peak",
        "            not included: the process itself, communication buffers, memory fragmentation",
    ]
    scoring_fits = True
    if arguments.dft.base_scores and data is not None:
        scoring = plan_scoring(model, training, setting.layout, data.datasets, report, data.longest, fused)
        scoring_fits = scoring.peak <= memory * HEADROOM
        lines += _scoring_lines(scoring, scoring_fits)
    if requested.peak <= memory * HEADROOM and scoring_fits:
        return [
            *lines,
            f"fits        yes: {100 * requested.peak / memory:.0f} % of {format_gib(memory)} per device",
        ]
    lines.append(
        f"fits        no: {format_gib(memory)} per device, of which a plan may use {100 * HEADROOM:.0f} %"
    )
    if requested.peak <= memory * HEADROOM:  # the pass of --base_scores does not
        return lines
    alternatives = closest_fitting_plans(model, training, setting, batch_tokens, fused, memory, share)
    return [*lines, *_alternative_lines(alternatives)]


def _scoring_lines(scoring: ScoringPlan, fits: bool) -> list[str]:
    """Return the lines on the pass over the data that --base_scores makes before training."""
    evaluation = (
        f", {scoring.evaluation_tokens:,} of them for evaluation" if scoring.evaluation_tokens else ""
    )
    cost = ""
    if scoring.operations is not None and scoring.epoch_share is not None:
        cost = (
            f": {scoring.operations:.2g} operations, {100 * scoring.epoch_share:.0f} % of those of an epoch "
            "of training"
        )
    text = (
        f"one forward pass over {scoring.tokens:,} tokens before training{evaluation}{cost}; about "
        f"{format_gib(scoring.peak)} per device at its peak, and {scoring.stored / 2**20:,.1f} MiB in "
        "--data_cache_dir. A run that finds the scores there makes no such pass"
    )
    if not fits:
        text += ". It does not fit: use a smaller --per_device_eval_batch_size, or --deepspeed zero3"
    return wrap("base scores", text)


def _model_size(model: PreTrainedModel) -> str:
    """Return the number of parameters, how many are trainable, and the dtype of the weights."""
    # A byte of 4-bit weights holds two parameters.
    total = sum(weight.numel() * (2 if weight.dtype == torch.uint8 else 1) for weight in model.parameters())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    dtype = str(model.dtype).removeprefix("torch.")
    linear = ", linear layers in 4 bits" if has_4bit_weights(model) else ""
    return f"{total / 1e6:,.1f} M parameters, {trainable / 1e6:,.1f} M trainable, {dtype} weights{linear}"


def _alternative_lines(alternatives: list[Plan]) -> list[str]:
    """Return a line for each setting that fits, or the remaining remedies if none does."""
    if not alternatives:
        return [
            "            no smaller batch, gradient checkpointing, ZeRO-3 or offload is enough: use more "
            "devices (--plan_world_size), --lora_r 16, or a shorter --max_length"
        ]
    return [
        "            the closest settings that fit:",
        *(
            f"            {' '.join(alternative.setting.changes)}: about {format_gib(alternative.peak)}"
            for alternative in alternatives
        ),
    ]
