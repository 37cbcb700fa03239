"""A trainer that is killed at a chosen moment.

DIE_AT names it: `step 4`, when that step is done and before anything follows; `micro 4.1`, within the step
after 4, when so many of its micro-batches are done; `evaluating 4` and `evaluated 4`, within and after the
evaluation at that step; `saving 4 PART`, in the save of that step when PART of it (model, optimizer, state,
sealed) is written; `verifying 4`, when the model of that save is to be verified.

DIE_BY is the signal, or something else happens and the run lives on: FULL, READ_ONLY or GONE, which the DISK
is then; NAN, written into the weights in the folder DISK; or MEMORY, of which the process may take DISK more
bytes from then on. DIE_TIMES is how often the signal is sent, DIE_RANK the rank that gets it, all of them by
default.
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
    """Does what is to be done at this moment, once."""
    wanted, rank = os.environ.get("DIE_AT"), os.environ.get("RANK", "0")
    global _is_dead
    if wanted == moment and not _is_dead and os.environ.get("DIE_RANK", rank) == rank:
        _is_dead = True  # a signal may be survived, and the moment come again
        by, disk = os.environ.get("DIE_BY", "SIGKILL"), os.environ.get("DISK", "")
        if by == "FULL":
            fill(Path(disk))
        elif by == "READ_ONLY":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        elif by == "GONE":
            os.rename(disk, f"{disk}.gone")
        elif by == "NAN":
            write_nan(Path(disk) / "model.safetensors")
        elif by == "MEMORY":
            pages = int(Path("/proc/self/statm").read_bytes().split()[0])
            most = pages * resource.getpagesize() + int(disk)
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        else:
            for _ in range(int(os.environ.get("DIE_TIMES", "1"))):
                os.kill(os.getpid(), signal.Signals[by])


def fill(disk: Path) -> None:
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**16))


def write_nan(file: Path) -> None:
    weights = load_file(file)
    name = min(weights)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


class DyingTrainer(DFTTrainer):
    """A trainer that dies at the chosen moment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
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
        time.sleep(float(os.environ.get("SAVE_SLOWLY", "0")))  # seconds, so that kills at random come within
        die_at(f"saving {self.state.global_step} {part}")


class DieAtStepEnd(TrainerCallback):
    """Calls a trainer at the end of each step, before the trainer's own callback."""

    def __init__(self, trainer: DyingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()
