"""What to say, and what to try next, when memory runs out."""

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
from dft.console import say
from dft.errors import EXIT_USER_ERROR, UserError
from dft.ranks import world_size
from dft.training.memory.estimate import (
    estimate_activations,
    estimate_logits,
    estimate_memory,
    format_gib,
    has_4bit_weights,
)
from dft.training.parameters import GIB

SMALLER = 76
"""Exit code of a run that noted a smaller batch under --auto_find_batch_size: the same command goes on."""
MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError)
"""What is raised where memory runs out; mostly for other reasons, so `ran_out` has to be asked."""
WORDS = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "Cannot allocate memory")
"""In those RuntimeErrors that say so."""
SHARD = (
    "load them in half precision (--torch_dtype bfloat16), or spread them over GPUs (--deepspeed "
    "ds_config/zero3.json) or to the CPU's memory (zero3_offload.json)"
)
WORTH_SAYING = 0.01
"""Share of all there is that a remedy has to save."""


class OutOfMemory(UserError):
    """Memory ran out.

    Attributes:
        smaller: whether a smaller batch was noted, with which the same command goes on.
    """

    def __init__(self, message: str, smaller: bool) -> None:
        super().__init__(message)
        self.smaller, self.code = smaller, SMALLER if smaller else EXIT_USER_ERROR


@dataclass
class MicroBatch:
    """What was computed last.

    Attributes:
        rows, tokens: of its input; 0 before the first one.
        is_training: and not an evaluation.
    """

    rows: int = 0
    tokens: int = 0
    is_training: bool = True


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory did."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


@contextmanager
def telling_what_did_not_fit(what: str, remedy: str) -> Iterator[None]:
    """Raises `UserError` where memory runs out before there is a trainer."""
    try:
        yield
    except MEMORY_ERRORS as error:
        if not ran_out(error):
            raise
        raise UserError(f"out of memory: {what} ({asked_for(error)}); {remedy}") from None


def asked_for(error: BaseException) -> str:
    """What could not be had."""
    found = re.search(r"ried to allocate ([\d.]+ ?\w+)", str(error))
    if found is None:
        return "of unknown size"
    amount, unit = re.fullmatch(r"([\d.]+) ?(\w+)", found[1]).groups()
    return f"asked for {format_gib(float(amount) / GIB) if unit == 'bytes' else found[1]}"


def free_unused_memory() -> None:
    """Gives back what no tensor uses any more. To be called when the exception is gone: it keeps frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def note_smaller_batch(
    args: transformers.TrainingArguments, requested: tuple[int, int] | None, last: MicroBatch
) -> str | None:
    """Record a smaller batch for the next attempt, and return the sentence that says so.

    Args:
        requested: (rows per device, accumulation steps) that the user requested; None to record nothing.
        last: the micro-batch that did not fit. One of an evaluation does not become smaller.

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
    """End a run whose memory ran out. Call it when the exception is gone, and with it the frames it holds.

    Args:
        message: what took the memory, see `advice`.
        requested: (rows per device, accumulation steps) that the user requested, to record a smaller batch
            for the next attempt; None to record nothing.
        last: the micro-batch that did not fit.
        save: saves the last completed step. Only called with one rank: others may still be within the step.

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


def advice(
    model: nn.Module,
    args: transformers.TrainingArguments,
    last: MicroBatch,
    is_fused: bool,
    error: BaseException,
    step: int,
) -> str:
    """What took the memory, and which flags to change, those that save most first.

    Args:
        last: the micro-batch that did not fit.
        is_fused: whether the loss is computed without logits.
        step: the optimizer step that was being made.
    """
    known = estimate_memory(model, args, last.tokens)
    activations = estimate_activations(model, args, last.rows, last.tokens)
    logits = 0.0 if is_fused else estimate_logits(model, args, last.tokens)
    if not last.is_training:
        activations, logits = 0.0, logits / 3  # nothing is kept for a gradient
    parts = {
        "weights": known.weights,
        "gradients": known.gradients,
        "optimizer": known.optimizer or 0.0,
        "activations": activations,
        "logits" if logits else "loss": logits or known.head,
    }
    total = sum(parts.values())
    held = ", ".join(f"{name} {format_gib(one)}" for name, one in parts.items() if one > 0)
    saved = remedies(model, args, last, parts)
    saved += [(gap, "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment") for gap in fragments()]
    worth = sorted((one for one in saved if one[0] > WORTH_SAYING * total), reverse=True)
    told = "; ".join(
        f"{number}. {text} (saves about {format_gib(gib)})" for number, (gib, text) in enumerate(worth, 1)
    )
    doing = "training" if last.is_training else "evaluating"
    where = f"{doing} {last.rows} x {last.tokens // max(1, last.rows):,} tokens" if last.rows else "preparing"
    return (
        f"out of memory in step {step}, {where} ({asked_for(error)}{in_use(args.device)}). By size, on each "
        f"device: {held}. To change, in order of effect: {told or 'use a smaller model, or more devices'}"
    )


def in_use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device) / GIB
    return (
        f"; the device has {format_gib(total / GIB)}, {format_gib(free / GIB)} of it free, "
        f"{format_gib(peak)} used at the peak"
    )


def fragments() -> list[float]:
    """GiB that torch's allocator holds and cannot hand out."""
    if not torch.cuda.is_available():
        return []
    return [(torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB]


def remedies(
    model: nn.Module, args: transformers.TrainingArguments, last: MicroBatch, parts: dict[str, float]
) -> list[tuple[float, str]]:
    """(GiB that it saves, what to do) of each remedy that this run has not taken yet."""
    found = []
    per_batch = parts["activations"] + parts.get("logits", 0.0)
    if "logits" in parts:
        found.append((parts["logits"], "--fused_head auto, where the model allows it"))
    if not last.is_training:
        if last.rows > 1:
            text = f"--per_device_eval_batch_size {last.rows // 2}"
            found.append((per_batch / 2 or parts["loss"] / 2, text))
        return found
    if not args.gradient_checkpointing:
        kept = estimate_activations(model, args, last.rows, last.tokens, checkpointed=True)
        found.append((parts["activations"] - kept, "--enable_gradient_checkpointing True"))
    smaller = smaller_batch(args)
    if smaller is not None:
        text = "--per_device_train_batch_size {} --gradient_accumulation_steps {}".format(*smaller)
        share = 1 - smaller[0] / args.per_device_train_batch_size
        found.append((per_batch * share, f"{text}, the same result (--auto_find_batch_size True does that)"))
    elif last.tokens > 1:
        found.append((per_batch / 2, f"--max_length {last.tokens // last.rows // 2}"))
    if args.device.type == "cuda" and args.mixed_precision == "no" and model.dtype.itemsize == 4:
        found.append((parts["activations"] / 2, "--bf16 True"))
    stage, optimizer_away, weights_away = zero_of(args)
    ranks, state = world_size(), parts["weights"] + parts["gradients"] + parts["optimizer"]
    if ranks > 1 and not args.fsdp and not has_4bit_weights(model) and stage < 3:
        # What is sharded already is an n-th of what it would be.
        shared = {0: state, 1: state - parts["optimizer"], 2: parts["weights"]}[stage]
        found.append((shared * (1 - 1 / ranks), "--deepspeed ds_config/zero3.json"))
    offloaded = optimizer_away and weights_away
    if args.device.type == "cuda" and stage and not has_4bit_weights(model) and not offloaded:
        away = parts["optimizer"] + parts["gradients"] + parts["weights"]
        found.append((away, "--deepspeed ds_config/zero3_offload.json, which is slower"))
    return found


# ---- the search for a batch that fits ----
