"""Explain out-of-memory errors and suggest flags to change."""

import errno
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
import transformers
from torch import nn

from dft.arguments.batch_search import smaller_batch, store_smaller_batch
from dft.arguments.deepspeed_file import zero_of
from dft.arguments.training import needs_whole_matrices
from dft.console import say
from dft.errors import EXIT_SMALLER_BATCH, EXIT_USER_ERROR, UserError
from dft.ranks import world_size
from dft.training.memory.estimate import (
    estimate_activations,
    estimate_logits,
    estimate_memory,
    format_gib,
    has_4bit_weights,
)
from dft.training.parameters import GIB

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError)
"""Exceptions raised when memory runs out, but also for other reasons; check with `ran_out`."""
MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "Cannot allocate memory")
"""Parts of the messages of such RuntimeErrors."""
SHARD = (
    "load them in half precision (--torch_dtype bfloat16), or spread them over GPUs (--deepspeed "
    "zero3) or to the CPU's memory (--deepspeed zero3_offload)"
)
MIN_SAVED_SHARE = 0.01
"""Share of the total that a remedy must save to be mentioned."""


class OutOfMemory(UserError):
    """Raised when memory runs out.

    Attributes:
        smaller: whether a smaller batch was recorded for the next run of the same command.
    """

    def __init__(self, message: str, smaller: bool) -> None:
        super().__init__(message)
        self.smaller, self.code = smaller, EXIT_SMALLER_BATCH if smaller else EXIT_USER_ERROR


@dataclass
class MicroBatch:
    """The most recent micro-batch.

    Attributes:
        rows: number of its rows; 0 before the first micro-batch.
        tokens: number of its tokens, including padding.
        is_training: whether it belongs to training rather than evaluation.
    """

    rows: int = 0
    tokens: int = 0
    is_training: bool = True


def ran_out(error: BaseException) -> bool:
    """Return whether an exception is an out-of-memory error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


@contextmanager
def convert_memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Raise `UserError` if memory runs out before there is a trainer.

    Args:
        what: description of what does not fit, for the message.
        remedy: flags to change, for the message.
    """
    try:
        yield
    except MEMORY_ERRORS as error:
        if not ran_out(error):
            raise
        raise UserError(f"out of memory: {what} ({asked_for(error)}); {remedy}") from None


def asked_for(error: BaseException) -> str:
    """Describe how much memory could not be allocated."""
    match = re.search(r"ried to allocate (([\d.]+) ?(\w+))", str(error))
    if match is None:
        return "of unknown size"
    size, amount, unit = match.groups()
    return f"asked for {format_gib(float(amount) / GIB) if unit == 'bytes' else size}"


def free_unused_memory() -> None:
    """Free unused memory. Call this outside the exception handler, since an exception keeps frames alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def note_smaller_batch(
    args: transformers.TrainingArguments, requested: tuple[int, int] | None, last: MicroBatch
) -> str | None:
    """Record a smaller batch for the next attempt and return a message about it.

    Args:
        requested: (rows per device, accumulation steps) that the user requested; None to not record a batch.
        last: the micro-batch that did not fit. An evaluation batch is not made smaller.

    Returns:
        None if no smaller batch was recorded.
    """
    if requested is None or not last.is_training:
        return None
    smaller = store_smaller_batch(args, requested)
    if smaller is None:
        return None
    return (
        f". --auto_find_batch_size: {smaller[0]} rows per device and {smaller[1]} accumulated are next, with "
        "the same command"
    )


def end_out_of_memory(
    message: str,
    args: transformers.TrainingArguments,
    requested: tuple[int, int] | None,
    last: MicroBatch,
    save: Callable[[], None],
) -> NoReturn:
    """End a run that is out of memory. Call this outside the exception handler, which keeps frames alive.

    Args:
        message: description of the memory use, see `memory_advice`.
        requested: (rows per device, accumulation steps) that the user requested, to record a smaller batch
            for the next attempt; None to not record one.
        last: the micro-batch that did not fit.
        save: saves the last completed step. Called only with one rank, since other ranks may still be within
            the step.

    Raises:
        OutOfMemory: always.
    """
    free_unused_memory()
    note = note_smaller_batch(args, requested, last)
    if args.world_size == 1:
        try:
            save()
        except MEMORY_ERRORS as error:
            if not ran_out(error):
                raise
            say("warning     there is too little memory to save the last completed step as well")
    raise OutOfMemory(message + (note or ""), note is not None)


# ---- the message ----


def memory_advice(
    model: nn.Module,
    args: transformers.TrainingArguments,
    last: MicroBatch,
    is_fused: bool,
    error: BaseException,
    step: int,
) -> str:
    """Describe the memory use and the flags to change, those that save most first.

    Args:
        model: the trained model.
        args: the training arguments.
        last: the micro-batch that did not fit.
        is_fused: whether the loss is computed without logits.
        error: the exception.
        step: the optimizer step that was being computed.
    """
    estimate = estimate_memory(model, args, last.tokens)
    activations = estimate_activations(model, args, last.rows, last.tokens)
    logits = 0.0 if is_fused else estimate_logits(model, args, last.tokens)
    if not last.is_training:
        activations, logits = 0.0, logits / 3  # no activations are kept for a backward pass
    parts = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer or 0.0,
        "activations": activations,
        "logits" if logits else "loss": logits or estimate.head,
    }
    total = sum(parts.values())
    held = ", ".join(f"{name} {format_gib(gib)}" for name, gib in parts.items() if gib > 0)
    saved = remedies(model, args, last, parts)
    saved += [
        (gap, "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment") for gap in unusable_memory()
    ]
    useful = sorted((remedy for remedy in saved if remedy[0] > MIN_SAVED_SHARE * total), reverse=True)
    changes = "; ".join(
        f"{number}. {text} (saves about {format_gib(gib)})" for number, (gib, text) in enumerate(useful, 1)
    )
    doing = "training" if last.is_training else "evaluating"
    where = f"{doing} {last.rows} x {last.tokens // max(1, last.rows):,} tokens" if last.rows else "preparing"
    return (
        f"out of memory in step {step}, {where} ({asked_for(error)}{device_usage(args.device)}). By size, on "
        f"each device: {held}. To change, in order of effect: "
        f"{changes or 'use a smaller model, or more devices'}"
    )


def device_usage(device: torch.device) -> str:
    """Describe the size and use of a GPU's memory; empty for other devices."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device) / GIB
    return (
        f"; the device has {format_gib(total / GIB)}, {format_gib(free / GIB)} of it free, "
        f"{format_gib(peak)} used at the peak"
    )


def unusable_memory() -> list[float]:
    """Return a list with the GiB that torch's allocator has reserved but cannot use; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    return [(torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB]


def remedies(
    model: nn.Module, args: transformers.TrainingArguments, last: MicroBatch, parts: dict[str, float]
) -> list[tuple[float, str]]:
    """Return the remedies that this run does not use yet, each with the GiB that it saves.

    Args:
        model: the trained model.
        args: the training arguments.
        last: the micro-batch that did not fit.
        parts: GiB by component.
    """
    changes: list[tuple[float, str]] = []
    per_batch = parts["activations"] + parts.get("logits", 0.0)
    if "logits" in parts:
        changes.append((parts["logits"], "--fused_head auto, where the model allows it"))
    if not last.is_training:
        if last.rows > 1:
            text = f"--per_device_eval_batch_size {last.rows // 2}"
            changes.append((per_batch / 2 or parts["loss"] / 2, text))
        return changes
    if not args.gradient_checkpointing:
        remaining = estimate_activations(model, args, last.rows, last.tokens, checkpointed=True)
        changes.append((parts["activations"] - remaining, "--enable_gradient_checkpointing True"))
    smaller = smaller_batch(args)
    if smaller is not None:
        text = "--per_device_train_batch_size {} --gradient_accumulation_steps {}".format(*smaller)
        share = 1 - smaller[0] / args.per_device_train_batch_size
        changes.append(
            (per_batch * share, f"{text}, the same result (--auto_find_batch_size True does that)")
        )
    elif last.tokens > 1:
        changes.append((per_batch / 2, f"--max_length {last.tokens // last.rows // 2}"))
    if args.device.type == "cuda" and args.mixed_precision == "no" and model.dtype.itemsize == 4:
        changes.append((parts["activations"] / 2, "--bf16 True"))
    stage, optimizer_away, weights_away = zero_of(args)
    ranks, state = world_size(), parts["weights"] + parts["gradients"] + parts["optimizer"]
    shardable = not has_4bit_weights(model) and not needs_whole_matrices(args)
    if ranks > 1 and not args.fsdp and shardable and stage < 3:
        # Sizes of sharded components are those of one shard.
        shared = {0: state, 1: state - parts["optimizer"], 2: parts["weights"]}[stage]
        changes.append((shared * (1 - 1 / ranks), "--deepspeed zero3"))
    offloaded = optimizer_away and weights_away
    if args.device.type == "cuda" and stage and not has_4bit_weights(model) and not offloaded:
        away = parts["optimizer"] + parts["gradients"] + parts["weights"]
        changes.append((away, "--deepspeed zero3_offload, which is slower"))
    return changes


# ---- the search for a batch that fits ----
