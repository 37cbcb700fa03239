"""The batch size found by `--auto_find_batch_size`, stored in a file between attempts."""

import json
from pathlib import Path

import transformers
from accelerate.utils import gather_object

from dft.errors import UserError
from dft.files import write_atomically
from dft.ranks import world_size

BATCH_FILE = "batch_size.json"
"""Name of the file in the output folder that holds the batch size of the next attempt."""


def smaller_batch(args: transformers.TrainingArguments) -> tuple[int, int] | None:
    """Return the next smaller batch size with the same number of rows per optimizer step.

    Returns:
        Batch size per device and gradient accumulation steps; None if there is no smaller batch.
    """
    batch = args.per_device_train_batch_size
    rows = batch * args.gradient_accumulation_steps
    return next(((size, rows // size) for size in range(batch // 2, 0, -1) if rows % size == 0), None)


def store_smaller_batch(
    args: transformers.TrainingArguments, requested: tuple[int, int]
) -> tuple[int, int] | None:
    """Write the next smaller batch size to `BATCH_FILE`, for the next attempt of the same command.

    Args:
        requested: batch size and accumulation steps of the command line.

    Returns:
        The batch size that was written, or None if there is no smaller one.
    """
    smaller = smaller_batch(args)
    if smaller is not None:
        content = {"asked": [*requested, world_size()], "found": smaller}
        write_atomically(Path(args.output_dir) / BATCH_FILE, [json.dumps(content)])
    return smaller


def load_batch(output_dir: str, requested: tuple[int, int]) -> tuple[int, int] | None:
    """Return the batch size that `store_smaller_batch` wrote for the same request and number of ranks.

    Raises:
        UserError: the content of the file is not valid.
    """
    file = Path(output_dir) / BATCH_FILE
    try:
        content = json.loads(file.read_text())
        batch, accumulation = content["found"]
        if content["asked"] != [*requested, world_size()]:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--auto_find_batch_size True: {file} cannot be read; remove it") from None
    if not (isinstance(batch, int) and batch > 0 and batch * accumulation == requested[0] * requested[1]):
        raise UserError(f"--auto_find_batch_size True: {file} holds no valid batch size; remove it")
    return batch, accumulation


def check_same_batch(args: transformers.TrainingArguments) -> None:
    """Raise `UserError` on all ranks if they read different batch sizes. This is a collective."""
    batch = [args.per_device_train_batch_size, args.gradient_accumulation_steps]
    if world_size() > 1 and args.requested_batch is not None:
        batches = gather_object([batch])
        if any(other != batches[0] for other in batches):
            raise UserError(
                f"--auto_find_batch_size True: the ranks read different batch sizes ({batches}); "
                f"{BATCH_FILE} must be on a file system that all machines share"
            )
