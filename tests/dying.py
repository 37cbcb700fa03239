"""Trainer with a fault that environment variables inject at a chosen moment.

DIE_AT      moment of the fault:
              `creating`             before the trainer is created
              `step 4`               after step 4, before anything else
              `micro 4.1`            in the step after step 4, after its first micro-batch
              `evaluating 4`         in the evaluation at step 4
              `evaluated 4`          after the evaluation at step 4
              `saving 4 PART`        in the save at step 4, after PART of it is written: model, optimizer,
                                     state, sealed, or final for the last save
              `verifying 4`          before the model of the save at step 4 is verified
DIE_BY      name of the signal to send, SIGKILL by default, or another fault after which the run continues:
              FULL, READ_ONLY, GONE  state of the disk DISK from then on
              NAN                    written into the weights in the folder DISK
              MEMORY                 limit on the memory that the process may take from then on, DISK bytes
DIE_TIMES   how often the signal is sent, once by default
DIE_RANK    rank of the fault, all by default
SAVE_SLOWLY seconds to wait after each part of a save, so that kills at random times hit saves
"""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from dft import DFTTrainer
from dft.training.checkpoints import writer
from dft.training.checkpoints.folder import NAME, UNFINISHED
from dft.training.checkpoints.verify import SaveVerifier

_is_dead = False


def die_at(moment: str) -> None:
    """Inject the fault if this is its moment, once."""
    global _is_dead
    rank = os.environ.get("RANK", "0")
    if os.environ.get("DIE_AT") == moment and not _is_dead and os.environ.get("DIE_RANK", rank) == rank:
        _is_dead = True  # the process may survive the signal, and the moment may recur
        fault, disk = os.environ.get("DIE_BY", "SIGKILL"), os.environ.get("DISK", "")
        if fault == "FULL":
            fill(Path(disk))
        elif fault == "READ_ONLY":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        elif fault == "GONE":
            os.rename(disk, f"{disk}.gone")
        elif fault == "NAN":
            write_nan(Path(disk) / "model.safetensors")
        elif fault == "MEMORY":
            pages = int(Path("/proc/self/statm").read_bytes().split()[0])
            limit = pages * resource.getpagesize() + int(disk)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        else:
            for _ in range(int(os.environ.get("DIE_TIMES", "1"))):
                os.kill(os.getpid(), signal.Signals[fault])


def fill(disk: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**16))


def write_nan(file: Path) -> None:
    """Set the first value of a saved weight to NaN."""
    weights = load_file(file)
    name = min(weights)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


class DyingTrainer(DFTTrainer):
    """Trainer that calls `die_at` at every moment that DIE_AT can name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        die_at("creating")
        super().__init__(*args, **kwargs)
        self._micro = 0
        self.add_callback(DieAtStepEnd(self))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._micro += 1
        die_at(f"micro {self.state.global_step}.{self._micro}")
        return loss

    def end_step(self) -> None:
        self._micro = 0
        die_at(f"step {self.state.global_step}")

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super().evaluate(*args, **kwargs)
        die_at(f"evaluated {self.state.global_step}")
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        die_at(f"evaluating {self.state.global_step}")
        return super().prediction_step(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._dying_verification():
            super().save_model(output_dir, _internal_call)
        self._saved("final")

    def _write_model(self, folder: Path) -> None:
        super()._write_model(folder)
        if NAME.fullmatch(folder.name.removeprefix(UNFINISHED)):
            self._saved("model")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._saved("optimizer")

    def _write_training_state(self, folder: Path) -> None:
        super()._write_training_state(folder)
        self._saved("state")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        publish = writer.publish

        def dying(folder: Any) -> None:
            self._saved("sealed")
            publish(folder)

        with patch.object(writer, "publish", dying), self._dying_verification():
            super()._save_checkpoint(*args, **kwargs)

    @contextmanager
    def _dying_verification(self) -> Iterator[None]:
        check = SaveVerifier.check

        def dying(*args: Any, **kwargs: Any) -> None:
            if self.is_world_process_zero():
                die_at(f"verifying {self.state.global_step}")
            check(*args, **kwargs)

        with patch.object(SaveVerifier, "check", dying):
            yield

    def _saved(self, part: str) -> None:
        time.sleep(float(os.environ.get("SAVE_SLOWLY", "0")))
        die_at(f"saving {self.state.global_step} {part}")


class DieAtStepEnd(TrainerCallback):
    """Calls `DyingTrainer.end_step` at the end of each step, before the callback of the trainer itself."""

    def __init__(self, trainer: DyingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()
