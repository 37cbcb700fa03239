"""Information about the ranks of a run, and per-rank setup before a Trainer exists."""

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

from dft.program import command_of


def world_size() -> int:
    """Return the number of ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Return whether a launcher (deepspeed, torchrun, accelerate) started this process."""
    return "WORLD_SIZE" in os.environ


def launch_fault() -> str | None:
    """Describe incomplete or invalid environment variables of a launcher; None if there are none.

    With leftovers of an earlier launch, processes wait for others that do not exist, or train separately.
    """
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in needed if name in os.environ]
    missing = [name for name in needed if name not in os.environ]
    if not set(present) & set(needed[:3]):
        return None
    fault = f"but not {', '.join(missing)}" if missing else _invalid_rank_variables()
    if fault is None:
        return None
    return (
        f"the environment sets {', '.join(present)}, {fault}: no launcher started this "
        f"process; unset them (env {' '.join(f'-u {name}' for name in present)} {command_of()} ...), or "
        "start it with torchrun or deepspeed"
    )


def _invalid_rank_variables() -> str | None:
    """Describe a variable of a launcher whose value no launcher sets; None if all are valid."""
    ranks = os.environ["WORLD_SIZE"]
    for name, minimum in (("WORLD_SIZE", 1), ("MASTER_PORT", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ[name]
        if not text.isdecimal() or int(text) < minimum:
            return f"and {name}={text!r} is not a number of {minimum} or more"
        if minimum == 0 and int(text) >= int(ranks):
            return f"and {name}={text} is not below WORLD_SIZE={ranks}"
    return None


def port_fault(error: Exception) -> str:
    """Describe why the ranks of a run cannot connect to each other."""
    address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"port {port} of {address} is in use, probably by another run; give this one another port: "
            "deepspeed --master_port N, torchrun --master_port N"
        )
    return (
        f"rank {os.environ.get('RANK', '?')} cannot connect to {address}:{port} (MASTER_ADDR, MASTER_PORT): "
        f"{' '.join(str(error).split())}"
    )


def is_main_process() -> bool:
    """Return whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def describe_parallelism(training: transformers.TrainingArguments, ranks: int | None = None) -> str:
    """Describe how ranks share the work, for reports and checkpoints.

    Args:
        training: arguments of the run.
        ranks: number of ranks; default: those of the run.
    """
    if training.deepspeed_plugin is not None:  # also where accelerate launch sets it, without a flag
        method = f"DeepSpeed ZeRO-{training.deepspeed_plugin.zero_stage}"
    elif uses_fsdp(training):
        method = "FSDP 2"
    else:
        method = "DDP" if (ranks or world_size()) > 1 else "single process"
    size = sequence_parallel_size(training)
    return f"{method}, {size} ranks per sequence" if size > 1 else method


def uses_fsdp(training: transformers.TrainingArguments) -> bool:
    """Return whether FSDP will shard the model, by a flag or by accelerate launch."""
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sequence_parallel_size(training: transformers.TrainingArguments) -> int:
    """Return the number of ranks that share each sequence; 1 for arguments without that flag."""
    return vars(training).get("sequence_parallel_size", 1)


def data_parallel_size(training: transformers.TrainingArguments, ranks: int | None = None) -> int:
    """Return the data-parallel size: the number of ranks, or of groups of ranks that share sequences.

    Args:
        training: arguments of the run.
        ranks: number of ranks; default: those of the run.
    """
    return (ranks or world_size()) // sequence_parallel_size(training)


def rows_per_step(training: transformers.TrainingArguments) -> int:
    """Return the number of rows per optimizer step, over all micro-batches and ranks."""
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return rows * data_parallel_size(training)


def count_optimizer_steps(
    training: transformers.TrainingArguments, rows: int, groups: int | None = None
) -> int:
    """Return the number of optimizer steps of the run, computed as Trainer does.

    Args:
        training: arguments of the run.
        rows: number of rows of the training data.
        groups: data-parallel size; default: that of the run.
    """
    groups = groups or data_parallel_size(training)
    if training.max_steps > 0:
        return training.max_steps
    round_batches = math.floor if training.dataloader_drop_last else math.ceil
    batches = round_batches(rows / (training.per_device_train_batch_size * groups))
    steps_per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return math.ceil(training.num_train_epochs * steps_per_epoch)


def first_failure(failure: str | None) -> str | None:
    """Return the failure of the first rank that failed, or None. This is a collective.

    Args:
        failure: failure of this rank, or None.
    """
    if not torch.distributed.is_initialized():
        return failure
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    return next((message for message in failures if message is not None), None)


def mute_deepspeed() -> None:
    """Keep only DeepSpeed's warnings and errors; its messages about its own setup are not useful to users.

    DeepSpeed 0.19 also calls collectives by names that torch 2.13 deprecates; users cannot change that.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def choose_deepspeed_accelerator(name: str) -> None:
    """Set DeepSpeed's accelerator; otherwise it would guess one and print a message.

    accelerate imports DeepSpeed in every run, unless `dft.training.patches.skip_deepspeed_import` was called.
    """
    os.environ.setdefault("DS_ACCELERATOR", name)


def quiet_libraries() -> None:
    """Disable progress bars and hints of libraries, for scripts that load and save models."""
    disable_progress_bar()
    if not torch.accelerator.is_available():
        choose_deepspeed_accelerator("cpu")


def divide_cores() -> None:
    """Give each rank on a machine its share of the cores.

    accelerate would do the same, but with a warning from each rank.
    """
    if is_launched() and "OMP_NUM_THREADS" not in os.environ:
        share = (psutil.cpu_count(logical=False) or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, share))
        torch.set_num_threads(max(1, share))


def enable_cpu_sharding() -> None:
    """Let accelerate shard models over CPU ranks under FSDP as it does over GPUs.

    FSDP2 needs only ranks that can communicate. accelerate 1.15 uses it for ranks that it calls multi-GPU
    and silently trains whole copies on others. Call this after the process group is initialized.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def can_shard() -> bool:
    """Return whether accelerate can shard a model over the ranks of this run."""
    return PartialState().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)


def init_cpu_deepspeed() -> None:
    """Initialize the process group of a DeepSpeed run on CPU.

    Must be called before transformers parses its arguments: accelerate chooses no backend for DeepSpeed on
    CPU and would see a single rank.
    """
    import deepspeed  # slow to import, and needed only here

    # This operator is for inference. Compiling it takes half a minute, and fails without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)


def exit_rank(code: int = 0) -> None:
    """End this rank when its work is done. A single process with code 0 returns and exits normally.

    The process group and the interpreter are not shut down: threads that still run would be ended in the
    middle of C++ code, which sometimes aborted processes whose work was saved. Functions that are registered
    with atexit, such as those of trackers that send their last records, are called.

    Args:
        code: exit code.
    """
    if not torch.distributed.is_initialized():
        if code:
            sys.exit(code)
        return
    torch.distributed.barrier()  # so that no rank waits for one that has exited
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
