"""Check that the disk has room for everything a run will save."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from dft.arguments.deepspeed_file import zero_of
from dft.arguments.intervals import interval
from dft.arguments.training import TrainingArguments, optimizer_name
from dft.errors import UserError
from dft.files import free_bytes
from dft.ranks import count_optimizer_steps
from dft.training.checkpoints.folder import checkpoint_folders
from dft.training.model.adapters import has_adapters
from dft.training.parameters import GIB, element_count


def check_space(model: PreTrainedModel, training: TrainingArguments, rows: int) -> None:
    """Raise `UserError` if the output directory's disk cannot hold the checkpoints and the final model.

    The estimate is a lower bound: the weights, and the optimizer state of AdamW. It covers everything that
    all processes write to one disk. Quotas are not checked.

    Args:
        model: the model to be trained.
        training: the training arguments.
        rows: number of rows of the training data.
    """
    model_bytes, checkpoint_bytes = saved_bytes(model, training)
    folder = Path(training.output_dir)
    existing = len(checkpoint_folders(folder))
    at_once = max_checkpoints_at_once(training, count_optimizer_steps(training, rows))
    needed = model_bytes + max(0, at_once - existing) * checkpoint_bytes
    free = free_bytes(folder)
    if needed <= free:
        return
    checkpoints = f"{at_once} checkpoints of {checkpoint_bytes / GIB:.2f} GiB and " if at_once else ""
    remedies = ["name a folder on another disk", "free some space"]
    if at_once > 2:
        remedies.append("keep fewer with --save_total_limit (one more exists while the newest is written)")
    if at_once and not training.save_only_model:
        remedies.append("leave the optimizer out with --save_only_model True (which cannot be resumed)")
    raise UserError(
        f"--output_dir {folder}: {checkpoints}a model of {model_bytes / GIB:.2f} GiB will not fit, with "
        f"{free / GIB:.2f} GiB free; {', or '.join(remedies)}"
    )


def saved_bytes(model: PreTrainedModel, training: TrainingArguments) -> tuple[int, int]:
    """Return lower bounds on the size in bytes of a saved model and of a checkpoint."""
    parameters = list(model.parameters())
    if has_adapters(model):  # the base model is not saved
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    is_half = training.deepspeed and (training.bf16 or training.fp16)
    weights = sum(
        element_count(parameter) * (2 if is_half else parameter.dtype.itemsize) for parameter in parameters
    )
    trained = sum(element_count(parameter) for parameter in parameters if parameter.requires_grad)
    average = 4 * trained if training.ema_decay is not None and not training.save_only_model else 0
    if training.save_only_model or not optimizer_name(training).startswith("adamw_torch"):
        return weights, weights + average
    stage, _, _ = zero_of(training)
    optimizer_bytes = 12 if stage else 2 * model.dtype.itemsize  # DeepSpeed also keeps float32 weights
    return weights, weights + average + trained * optimizer_bytes


def max_checkpoints_at_once(training: TrainingArguments, steps: int) -> int:
    """Return the maximum number of checkpoints on disk.

    These are the ones to keep, the one being written, and one that is being uploaded to the hub.
    """
    by_strategy = {
        SaveStrategy.NO: 0,
        SaveStrategy.BEST: 1,
        SaveStrategy.EPOCH: max(1, int(training.num_train_epochs)) if training.max_steps <= 0 else 1,
    }
    saves = by_strategy.get(training.save_strategy)
    if saves is None:
        saves = max(1, int(steps // interval(training.save_steps, steps)))
    extra = 2 if training.push_to_hub else 1
    return min(saves, training.save_total_limit + extra) if training.save_total_limit else saves
