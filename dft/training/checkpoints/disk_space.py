"""Whether the disk can hold what a run will save."""

from pathlib import Path

from torch import nn
from transformers.trainer_utils import SaveStrategy

from dft.arguments.deepspeed_file import zero_of
from dft.arguments.training import TrainingArguments
from dft.errors import UserError
from dft.files import free_bytes
from dft.ranks import count_optimizer_steps
from dft.training.checkpoints.folder import checkpoint_folders
from dft.training.model.adapters import has_adapters
from dft.training.parameters import GIB, element_count


def check_space(model: nn.Module, training: TrainingArguments, rows: int) -> None:
    """Raises `UserError` if the output directory's disk cannot hold the checkpoints and the final model.

    It counts weights and the state of AdamW, what each run of that kind saves at least; a quota is not seen.
    Where only some of the processes write, as on one disk for all, what they write together counts.

    Args:
        rows: of the training data.
    """
    model_bytes, checkpoint_bytes = saved_bytes(model, training)
    folder = Path(training.output_dir)
    there = len(checkpoint_folders(folder))
    at_once = checkpoints_at_once(training, count_optimizer_steps(training, rows))
    needed = model_bytes + max(0, at_once - there) * checkpoint_bytes
    free = free_bytes(folder)
    if needed <= free:
        return
    held = f"{at_once} checkpoints of {checkpoint_bytes / GIB:.2f} GiB and " if at_once else ""
    remedies = ["name a folder on another disk", "free some space"]
    if at_once > 2:
        remedies.append("keep fewer with --save_total_limit (one more is there while the newest is written)")
    if at_once and not training.save_only_model:
        remedies.append("leave the optimizer out with --save_only_model True (nothing can be resumed then)")
    raise UserError(
        f"--output_dir {folder}: {held}a model of {model_bytes / GIB:.2f} GiB will not fit, with "
        f"{free / GIB:.2f} GiB free; {', or '.join(remedies)}"
    )


def saved_bytes(model: nn.Module, training: TrainingArguments) -> tuple[int, int]:
    """(model, checkpoint), at least."""
    parameters = list(model.parameters())
    if has_adapters(model):  # without what they adapt
        parameters = [one for one in parameters if one.requires_grad]
    halves = training.deepspeed and (training.bf16 or training.fp16)
    weights = sum(element_count(one) * (2 if halves else one.dtype.itemsize) for one in parameters)
    if training.save_only_model or not training.optim.value.startswith("adamw_torch"):
        return weights, weights
    trained = sum(element_count(one) for one in parameters if one.requires_grad)
    stage, _, _ = zero_of(training)
    moments = 12 if stage else 2 * model.dtype.itemsize  # with DeepSpeed's master weights, in float32
    return weights, weights + trained * moments


def checkpoints_at_once(training: TrainingArguments, steps: int) -> int:
    """How many checkpoints lie there at the most: one more than are kept, while the newest is written."""
    each = {
        SaveStrategy.NO: 0,
        SaveStrategy.BEST: 1,
        SaveStrategy.EPOCH: max(1, int(training.num_train_epochs)) if training.max_steps <= 0 else 1,
    }
    saves = each.get(training.save_strategy)
    if saves is None:
        every = training.save_steps if training.save_steps >= 1 else max(1, training.save_steps * steps)
        saves = max(1, int(steps // every))
    return min(saves, training.save_total_limit + 1) if training.save_total_limit else saves
