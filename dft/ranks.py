"""What has to be known or done about the other ranks before a Trainer exists."""

import atexit
import logging
import math
import os
import sys
import warnings

import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.utils.logging import disable_progress_bar


def world_size() -> int:
    """Processes of this run, as its launcher announced them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, accelerate) started this process."""
    return "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def describe_parallelism(training: transformers.TrainingArguments, ranks: int | None = None) -> str:
    """How the ranks of a run, or so many of them, share its work."""
    if training.deepspeed:
        how = f"DeepSpeed ZeRO-{training.hf_deepspeed_config.get_value('zero_optimization.stage', 0)}"
    elif training.fsdp:
        how = "FSDP 2"
    else:
        how = "DDP" if (ranks or world_size()) > 1 else "single process"
    size = sequence_parallel_size(training)
    return f"{how}, {size} ranks per sequence" if size > 1 else how


def sequence_parallel_size(training: transformers.TrainingArguments) -> int:
    """Ranks that share each sequence; transformers' own arguments do not have it."""
    return vars(training).get("sequence_parallel_size", 1)


def data_parallel_size(training: transformers.TrainingArguments, ranks: int | None = None) -> int:
    """Ranks of the run, or of so many, or groups of them that share sequences, with rows of their own."""
    return (ranks or world_size()) // sequence_parallel_size(training)


def rows_per_step(training: transformers.TrainingArguments) -> int:
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return rows * data_parallel_size(training)


def count_optimizer_steps(
    training: transformers.TrainingArguments, rows: int, groups: int | None = None
) -> int:
    """Optimizer steps of the run, as Trainer will count them.

    Args:
        rows: of the training data.
        groups: data-parallel ones, other than the run has.
    """
    groups = groups or data_parallel_size(training)
    if training.max_steps > 0:
        return training.max_steps
    rounded = math.floor if training.dataloader_drop_last else math.ceil
    batches = rounded(rows / (training.per_device_train_batch_size * groups))
    return math.ceil(
        training.num_train_epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps))
    )


def first_failure(failure: str | None) -> str | None:
    """What went wrong on the first rank where something did; a collective."""
    if not torch.distributed.is_initialized():
        return failure
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    return next((one for one in failures if one is not None), None)


def mute_deepspeed() -> None:
    """Leaves warnings and errors of DeepSpeed: what it notes of its own set-up is of no use to a run.

    DeepSpeed 0.19 also calls collectives by names that torch 2.13 deprecates, which no user can change.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def choose_deepspeed_accelerator(name: str) -> None:
    """Tells DeepSpeed, which accelerate imports in any run, where it is; it would guess, and say so."""
    os.environ.setdefault("DS_ACCELERATOR", name)


def quiet_libraries() -> None:
    """For scripts that load and save models: no bars for files, and no guess of DeepSpeed's where it is."""
    disable_progress_bar()
    if not torch.accelerator.is_available():
        choose_deepspeed_accelerator("cpu")


def divide_cores() -> None:
    """Gives each rank on a machine its part of the cores, as accelerate would with a warning from each."""
    if is_launched() and "OMP_NUM_THREADS" not in os.environ:
        share = (psutil.cpu_count(logical=False) or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, share))
        torch.set_num_threads(max(1, share))


def enable_cpu_sharding() -> None:
    """Has accelerate shard a model over CPU ranks under FSDP as it does over GPUs.

    FSDP2 itself asks for no more than ranks that can talk. accelerate 1.15 offers it to those that it calls
    multi-GPU alone, and would train whole copies on others without a word. Comes after the ranks have joined.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def can_shard() -> bool:
    """Whether accelerate shards a model over the ranks of this run, if it is told to."""
    return PartialState().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)


def init_cpu_deepspeed() -> None:
    """Joins the ranks of a DeepSpeed run on CPU.

    Must come before transformers parses its arguments: accelerate picks no backend for DeepSpeed on CPU and
    would otherwise see a world of one.
    """
    import deepspeed  # slow to import, and not needed by runs without it

    # An operator for inference, which DeepSpeed would compile for half a minute, or fail without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)


def exit_rank(code: int = 0) -> None:
    """Ends a rank whose work is done; a run of one process just goes on to its end if the code is 0.

    Neither the backend nor the interpreter is taken apart first: a thread that is still running then is made
    to exit in the middle of C++ code, which now and then aborted a process that had lost nothing. What was
    registered to run at exit, as trackers do to send their last records, is run here.
    """
    if not torch.distributed.is_initialized():
        if code:
            sys.exit(code)
        return
    torch.distributed.barrier()  # no rank is left talking to one that is gone
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
