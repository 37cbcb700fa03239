"""The batch size found by `--auto_find_batch_size`, stored between attempts."""

import json
from pathlib import Path

import transformers
from accelerate.utils import gather_object

from dft.errors import UserError
from dft.files import write_atomically
from dft.ranks import world_size

FOUND = "batch_size.json"
"""In the output directory: the batch that --auto_find_batch_size found to fit."""


def smaller_batch(args: transformers.TrainingArguments) -> tuple[int, int] | None:
    """The next smaller batch and the accumulation with which a step has as many rows; None below 1."""
    batch, rows = (
        args.per_device_train_batch_size,
        args.per_device_train_batch_size * args.gradient_accumulation_steps,
    )
    return next(((one, rows // one) for one in range(batch // 2, 0, -1) if rows % one == 0), None)


def note_smaller(args: transformers.TrainingArguments, asked: tuple[int, int]) -> tuple[int, int] | None:
    """Writes down the next smaller batch, for the same command to take. Returns it; None where there is none.

    Args:
        asked: batch and accumulation as the command line has them.
    """
    smaller = smaller_batch(args)
    if smaller is not None:
        fits = {"asked": [*asked, world_size()], "found": smaller}
        write_atomically(Path(args.output_dir) / FOUND, [json.dumps(fits)])
    return smaller


def found_batch(output_dir: str, asked: tuple[int, int]) -> tuple[int, int] | None:
    """What `note_smaller` wrote down for the same request on as many ranks.

    Raises:
        UserError: the file is not what it wrote.
    """
    file = Path(output_dir) / FOUND
    try:
        content = json.loads(file.read_text())
        batch, accumulation = content["found"]
        if content["asked"] != [*asked, world_size()]:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--auto_find_batch_size True: {file} cannot be read; remove it") from None
    if not (isinstance(batch, int) and batch > 0 and batch * accumulation == asked[0] * asked[1]):
        raise UserError(f"--auto_find_batch_size True: {file} holds no batch of this run; remove it")
    return batch, accumulation


def check_agreed(args: transformers.TrainingArguments) -> None:
    """Raises `UserError`, on all ranks, where one does not see what another wrote down; a collective."""
    mine = [args.per_device_train_batch_size, args.gradient_accumulation_steps]
    if world_size() > 1 and args.asked_batch is not None:
        others = gather_object([mine])
        if any(one != others[0] for one in others):
            raise UserError(
                f"--auto_find_batch_size True: the ranks found different batches ({others}); {FOUND} must be "
                "on a file system that all machines share"
            )
