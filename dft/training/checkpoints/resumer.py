"""Load the checkpoint that `resume_point` selects, in the trainer and on all ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME

from dft.errors import UserError
from dft.training.checkpoints.folder import (
    NO_PICKLE,
    Checkpoint,
    new_run_advice,
    newest_checkpoint,
    open_checkpoint,
    reading,
)
from dft.training.checkpoints.optimizer_options import apply_options, read_options
from dft.training.checkpoints.resharding import resharded
from dft.training.checkpoints.resume_point import check_owner, check_same_model, named_checkpoint
from dft.training.checkpoints.run_settings import NEW_TOKENS, check_settings
from dft.training.checkpoints.run_state import RunState
from dft.training.model.weight_names import load_weights
from dft.training.patches import fix_zero3_universal_load


class Resumer:
    """Resumes a run from a checkpoint.

    Args:
        accelerator: the run's accelerator.
        output_dir: folder with the run's checkpoints.
        trust_checkpoint: whether to load a checkpoint that other users may have written.
        beat: reports progress to the rank watchdog, see `Heartbeat.beat`.

    Attributes:
        checkpoint: folder of the checkpoint whose events are still pending; None if there is none.
        creates_optimizer: whether optimizer and schedule are created from the arguments; otherwise they keep
            the settings of the checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        trust_checkpoint: bool = False,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoint: Path | None = None
        self.creates_optimizer = True
        self._options: list[dict[str, Any]] = []
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._trust_checkpoint = trust_checkpoint
        self._beat = beat

    def resolve(
        self, resume_from: str | bool | None, model_digest: str, settings: Mapping[str, Any] | None = None
    ) -> str | None:
        """Return the folder to resume from, after checking that it is trusted and can be loaded.

        Args:
            resume_from: a folder; True for the newest complete checkpoint of the output directory; None or
                False to start a new run.
            model_digest: digest of the names and shapes of the model's weights.
            settings: those of this run, see `run_settings`.

        Raises:
            UserError: there is no such checkpoint, others may have written it, or it belongs to another
                model or was saved with settings that must not change.
        """
        self.checkpoint = None
        if not resume_from:
            return None
        checkpoint = self._newest() if resume_from is True else named_checkpoint(Path(resume_from))
        check_owner(checkpoint.path, self._trust_checkpoint)
        before, now = checkpoint.facts.get("settings", {}), dict(settings or {})
        # Other tokens may change the shapes of the model, which `check_same_model` could not explain.
        check_settings(checkpoint.path, before, {NEW_TOKENS: now.get(NEW_TOKENS)})
        check_same_model(checkpoint, model_digest)
        check_settings(checkpoint.path, before, now)
        self.checkpoint = checkpoint.path
        return str(checkpoint.path)

    def _newest(self) -> Checkpoint:
        checkpoint, _ = newest_checkpoint(self._output_dir)
        if checkpoint is None:
            raise UserError(f"there is no complete checkpoint in {self._output_dir}")
        return checkpoint

    def load_model(self, model: nn.Module, folder: str) -> bool:
        """Load the weights of a checkpoint, if the model is complete on this rank and has no adapters.

        Returns:
            Whether they were loaded. Otherwise transformers has to load them.

        Raises:
            UserError: the checkpoint lacks weights of the model.
        """
        is_sharded = self._accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if is_sharded or not isinstance(model, PreTrainedModel):
            return False
        missing = load_weights(model, Path(folder))
        if missing:
            raise UserError(
                f"--resume_from_checkpoint {folder}: its files lack {len(missing)} weights of the model, "
                f"including {missing[0]}; it is damaged: remove it, and --resume_from_checkpoint auto "
                "resumes from the one before"
            )
        return True

    @contextmanager
    def loading(self, folder: str | None, engine: Callable[[], Any]) -> Iterator[str | None]:
        """Yield the folder to load optimizer and scheduler from, resharded if the number of ranks changed.

        Args:
            folder: the checkpoint to resume from; None to start a new run.
            engine: returns DeepSpeed's engine once it has been made within the context.

        Raises:
            UserError: a file of the checkpoint cannot be read, or not all of it is on this machine.
        """
        if folder is None:
            yield None
            return
        with reading(Path(folder), NO_PICKLE):
            if self._accelerator.distributed_type != DistributedType.DEEPSPEED:
                check_optimizer_file(Path(folder))
                yield folder
                return
            checkpoint = open_checkpoint(Path(folder))
            check_whole(checkpoint)
            if checkpoint.facts["ranks"] == self._accelerator.num_processes:
                yield folder
                return
            with resharded(checkpoint.path, self._output_dir, self._accelerator, self._beat) as universal:
                yield str(universal)
                if engine().zero_optimization_partition_weights():
                    fix_zero3_universal_load(engine().optimizer, universal)

    def read_options(self, optimizer: AcceleratedOptimizer) -> None:
        """Remember the options of the new optimizer, which loading a checkpoint replaces."""
        self._options = read_options(optimizer)

    def apply_options(self, optimizer: AcceleratedOptimizer, scheduler: Any) -> None:
        """Give the optimizer and schedule of the checkpoint the settings of this run."""
        if self.checkpoint is not None and self.creates_optimizer:
            apply_options(optimizer, scheduler, self._options)

    def take_state(self) -> tuple[RunState, Checkpoint]:
        """Return the state of the run in the checkpoint, whose pending events are handled by the caller."""
        assert self.checkpoint is not None
        folder, self.checkpoint = self.checkpoint, None
        with reading(folder):
            return RunState.read(folder), open_checkpoint(folder)


def check_optimizer_file(folder: Path) -> None:
    """Raise `UserError` for a checkpoint without an optimizer that is not DeepSpeed's.

    Trainer would start with a new optimizer and a new schedule.
    """
    if not any(folder.glob("optimizer*")) or not (folder / SCHEDULER_NAME).is_file():
        raise UserError(
            f"--resume_from_checkpoint {folder}: has no optimizer and schedule that a run without DeepSpeed "
            f"can load; resume with --deepspeed, or {new_run_advice(folder)}"
        )


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise `UserError` for a DeepSpeed checkpoint that is only partly visible on this machine."""
    if not (checkpoint.path / "latest").is_file():  # written by rank 0
        raise UserError(
            f"--resume_from_checkpoint {checkpoint.path}: only a part of it is on this machine; DeepSpeed "
            "resumes only from a checkpoint that all machines see completely, so put --output_dir on a disk "
            "that they share"
        )
