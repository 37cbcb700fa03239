"""Check that batches fit in the shared memory through which worker processes pass them."""

import os
import sys
from pathlib import Path

from dft.arguments.training import TrainingArguments
from dft.errors import UserError
from dft.files import free_bytes

SHARED_MEMORY = Path("/dev/shm")
LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Variables in which torchrun and the launcher of DeepSpeed pass the number of ranks on this machine."""
BYTES_PER_TOKEN = 44
"""Size of a batch per token, of the tensors that the collators return."""
PAGES_PER_BATCH = 8 * 4096
"""Each tensor of a batch takes up a page of memory at least."""
PREFETCHED = 2
"""Batches that a worker of torch's `DataLoader` loads in advance by default."""
MIB = 2**20


def check_shared_memory(training: TrainingArguments, longest: int) -> None:
    """Check that the batches that all worker processes load in advance fit in shared memory.

    A worker that cannot allocate shared memory drops its batch, and `DataLoader` waits for it for ever.
    Containers often have only 64 MiB.

    Args:
        training: the training arguments.
        longest: number of tokens of the longest row.

    Raises:
        UserError: they may not fit.
    """
    workers = training.dataloader_num_workers
    if not workers or not sys.platform.startswith("linux"):
        return
    in_advance = workers * (training.dataloader_prefetch_factor or PREFETCHED) + 1
    local = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "1")
    ranks = int(local)
    rows = max(training.per_device_train_batch_size, training.per_device_eval_batch_size)
    needed = ranks * in_advance * batch_bytes(rows, longest)
    free = free_bytes(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else 0
    if needed > free:
        raise UserError(
            f"--dataloader_num_workers {workers}: up to {needed / MIB:,.1f} MiB of batches are loaded in "
            f"advance ({ranks} x {in_advance:,} batches of {rows:,} x {longest:,} tokens), but "
            f"{SHARED_MEMORY} has {free / MIB:,.1f} MiB free, and the run would wait for ever; start the "
            "container with --shm-size 8g or --ipc host, or pass --dataloader_num_workers 0"
        )


def batch_bytes(rows: int, longest: int) -> int:
    """Return the greatest size of a batch in shared memory, in bytes."""
    return rows * longest * BYTES_PER_TOKEN + PAGES_PER_BATCH
