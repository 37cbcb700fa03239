"""Folders of checkpoints: which one to go on from, and which ones to remove."""

import shutil
from pathlib import Path

import transformers
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from dft.errors import UserError
from dft.training.distributed import say, world_size


def remove_checkpoints(training: transformers.TrainingArguments) -> None:
    """Under --overwrite_output_dir, removes the checkpoints of an earlier run.

    Left in place, the newest of them would be taken for this run's own by --resume_from_checkpoint True.
    """
    if not training.overwrite_output_dir or training.resume_from_checkpoint or not training.should_save:
        return
    for folder in sort_checkpoints(training.output_dir):
        shutil.rmtree(folder)
        say(f"--overwrite_output_dir True: removed {folder}")


def resolve_resume(training: transformers.TrainingArguments) -> Path | None:
    """The checkpoint to go on from; `--resume_from_checkpoint True` is the newest in the output directory."""
    wanted = training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        training.resume_from_checkpoint = None
        return None
    found: str | None = wanted
    if wanted.lower() == "true":
        found = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
        if found is None:
            raise UserError(f"--resume_from_checkpoint True: there is no checkpoint in {training.output_dir}")
    elif not Path(wanted).is_dir():
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder")
    path = Path(found)
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {path}: not a checkpoint, it has no trainer_state.json")
    state = transformers.TrainerState.load_from_json(str(path / "trainer_state.json"))
    has_deepspeed = any(path.glob("global_step*"))
    if not has_deepspeed and not (path / "optimizer.pt").is_file():
        raise UserError(
            f"--resume_from_checkpoint {path}: holds the model alone (saved with --save_only_model True), "
            f"not the state of the optimizer; start a new run with --model_name_or_path {path}"
        )
    if has_deepspeed != bool(training.deepspeed):
        raise UserError(
            f"--resume_from_checkpoint {path}: saved {'with' if has_deepspeed else 'without'} --deepspeed, "
            "so it can only be resumed in the same way"
        )
    if has_deepspeed:
        check_shards(path, training)
    if training.max_steps > 0:
        finished = state.global_step >= training.max_steps
    else:
        finished = (
            state.global_step >= state.max_steps and training.num_train_epochs <= state.num_train_epochs
        )
    if finished:
        raise UserError(
            f"--resume_from_checkpoint {path}: is at step {state.global_step} already, and neither "
            "--max_steps nor --num_train_epochs asks for more"
        )
    training.resume_from_checkpoint = str(path)
    return path


def check_shards(path: Path, training: transformers.TrainingArguments) -> None:
    """Raises `UserError` where DeepSpeed divided the state otherwise than this run would."""
    ranks = len(list(path.glob("global_step*/*_optim_states.pt")))
    if ranks != world_size():
        raise UserError(
            f"--resume_from_checkpoint {path}: saved by {ranks} ranks, and this run has {world_size()}; "
            "DeepSpeed resumes on as many as it saved from"
        )
    was_zero3 = any(path.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
    if was_zero3 != training.hf_deepspeed_config.is_zero3():
        raise UserError(
            f"--resume_from_checkpoint {path}: saved {'under' if was_zero3 else 'without'} ZeRO-3, so it can "
            f"only be resumed {'under' if was_zero3 else 'without'} it; this is --deepspeed "
            f"{training.deepspeed}"
        )
