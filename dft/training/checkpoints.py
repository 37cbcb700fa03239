"""Folders of checkpoints: what Trainer itself does not do with them."""

import shutil

import transformers
from transformers.trainer_utils import sort_checkpoints

from dft.training.distributed import say


def remove_checkpoints(training: transformers.TrainingArguments) -> None:
    """Under --overwrite_output_dir, removes the checkpoints of an earlier run.

    Left in place, the newest of them would be taken for this run's own by --resume_from_checkpoint True.
    """
    if not training.overwrite_output_dir or training.resume_from_checkpoint or not training.should_save:
        return
    for folder in sort_checkpoints(training.output_dir):
        shutil.rmtree(folder)
        say(f"--overwrite_output_dir True: removed {folder}")
