"""Write one checkpoint or model folder so that it is complete or absent; `saver` calls this."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.console import say
from dft.errors import UserError
from dft.files import REPORT_PICTURE, write_atomically
from dft.training.checkpoints.disk import move_files, sees_the_same, writing_a_save
from dft.training.checkpoints.folder import UNFINISHED, publish, rotate, seal, unfinished
from dft.training.model.adapters import has_adapters, write_base_record
from dft.training.model.companion_files import copy_companions

CARD = "README.md"
CARD_COMMENT = "<!-- model card by train_dft.py -->"
"""Comment in every model card of this program. A README.md without it is not replaced."""
UNFINISHED_MODEL = f"{UNFINISHED}model"
"""Name of the folder in the output directory where the final model is staged."""


class CheckpointWriter:
    """Stages, seals, publishes and rotates the checkpoints of a run. All ranks must call every method.

    A checkpoint is first written under a temporary name. Once all its files are on disk, its manifest is
    written and it is renamed. Only then are older checkpoints removed. A failed save removes its partial
    files.

    Args:
        accelerator: the run's accelerator.
        is_writer: whether this rank writes the files of a model (`TrainingArguments.should_save`).
    """

    def __init__(self, accelerator: Accelerator, is_writer: bool) -> None:
        self._accelerator = accelerator
        self._is_writer = is_writer
        self._shares_disk: bool | None = None

    @contextmanager
    def stage(self, folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
        """Yield an empty folder to write a checkpoint to, and publish it when the context ends.

        Args:
            folder: final folder of the checkpoint.
            facts: what its manifest records in addition to the files.

        Raises:
            UserError: the disk is full, read-only or unavailable. Earlier checkpoints are left unchanged.
        """
        staging = unfinished(folder)
        with writing_a_save(folder.parent, staging):
            if not folder.parent.is_dir():
                raise UserError(
                    f"--output_dir {folder.parent}: it no longer exists, so {folder.name} cannot be saved; "
                    "was a disk unmounted, or the folder removed?"
                )
            self._clear(staging)
            yield staging
            self._accelerator.wait_for_everyone()
            self._publish(folder, facts)

    def _publish(self, folder: Path, facts: Mapping[str, Any]) -> None:
        if self._owns_disk(folder.parent):
            seal(unfinished(folder), dict(facts))
            publish(folder)
        self._accelerator.wait_for_everyone()

    @contextmanager
    def stage_model(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder to write the final model to, and move its files into `folder` afterwards.

        Raises:
            UserError: the disk is full, read-only or unavailable. An earlier model is left unchanged.
        """
        staging = folder / UNFINISHED_MODEL
        with writing_a_save(folder, staging):
            self._clear(staging)
            yield staging
            if self._is_writer:
                move_files(staging, folder)
            self._accelerator.wait_for_everyone()

    def rotate(self, run: Path, limit: int | None, best: str | None, in_use: set[Path]) -> None:
        """Remove the oldest checkpoints beyond `limit`, except the newest, the best and those in use."""
        if self._owns_disk(run):
            rotate(run, limit, best, in_use)

    def _owns_disk(self, folder: Path) -> bool:
        """Return whether this rank clears and renames folders on the disk of `folder`.

        These are rank 0 and the first rank of each machine with a separate disk at that path.
        """
        if self._shares_disk is None:
            self._shares_disk = sees_the_same(folder, self._accelerator)
        if self._accelerator.is_main_process:
            return True
        return self._accelerator.is_local_main_process and not self._shares_disk

    def _clear(self, staging: Path) -> None:
        """Create an empty folder, removing leftovers of an earlier save."""
        staging.parent.mkdir(parents=True, exist_ok=True)
        if self._owns_disk(staging.parent) and staging.exists():
            shutil.rmtree(staging)
        self._accelerator.wait_for_everyone()
        staging.mkdir(parents=True, exist_ok=True)


# ---- the files of a saved model ----


@contextmanager
def saved_use_cache(model: PreTrainedModel, use_cache: bool) -> Iterator[None]:
    """Set `use_cache` in the configuration while it is saved and restore it afterwards.

    Training switches the key-value cache off; a model that is loaded for generation needs the original
    setting.
    """
    config = model.config.get_text_config()
    in_training, config.use_cache = config.use_cache, use_cache
    try:
        yield
    finally:
        config.use_cache = in_training


def complete_model_folder(folder: Path, model: PreTrainedModel, model_digest: str) -> None:
    """Add the files that Trainer does not write to a saved model and remove the pickled arguments.

    The pickle is not needed, and it contains the hub's access token.
    """
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # absent where weights are saved in shards
    if not has_adapters(model):
        copy_companions(model.config.name_or_path, folder)
    else:
        write_base_record(folder, model, model_digest)
        model.generation_config.save_pretrained(folder)  # the end-of-turn tokens, for the merged model


def write_card(folder: Path, output_dir: Path, text: Callable[[bool], str]) -> None:
    """Write a model card next to the picture of the report, if there is one.

    Args:
        text: returns the card, given whether there is a picture.
    """
    picture = output_dir / REPORT_PICTURE
    if picture.is_file() and folder != picture.parent:
        shutil.copy(picture, folder)
    write_atomically(folder / CARD, [text(picture.is_file()), CARD_COMMENT, "\n"])


def keep_foreign_card(staging: Path, folder: Path) -> None:
    """Keep a README.md that this program did not write."""
    existing, new = folder / CARD, staging / CARD
    if new.is_file() and existing.is_file() and CARD_COMMENT not in existing.read_text(errors="replace"):
        new.unlink()
        say(f"note        {existing} was not written by this program: it is kept, and there is no model card")


def model_files(folder: Path) -> list[str]:
    """Return the paths of all files in a staged model, sub-folders included, relative to it."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def note_best_checkpoint(state: TrainerState, folder: Path) -> None:
    """Record the path of the best checkpoint: the one being written to `folder`, or an earlier one."""
    best = folder.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if state.best_global_step and (best == folder or best.exists()):
        state.best_model_checkpoint = str(best)
