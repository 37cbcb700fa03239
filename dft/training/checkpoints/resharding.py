"""Convert a DeepSpeed checkpoint for a different number of ranks."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from transformers.trainer import SCHEDULER_NAME

from dft.errors import UserError
from dft.ranks import first_failure
from dft.training.checkpoints.disk import sees_the_same
from dft.training.checkpoints.folder import UNFINISHED
from dft.training.parallel.waiting import wait_until

CONVERTER = ("-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")
"""Python interpreter arguments that run the converter to the universal format."""


@contextmanager
def resharded(
    checkpoint: Path, output_dir: Path, accelerator: Accelerator, beat: Callable[[], None]
) -> Iterator[Path]:
    """Yield a folder with the universal format of a checkpoint and remove it afterwards.

    DeepSpeed's converter runs in one process per disk; the folder takes as much space as the checkpoint.
    Within the context, the engine of this run is configured to load that format. All ranks must enter it.

    Args:
        beat: called while the conversion runs, see `Heartbeat.beat`.

    Raises:
        UserError: the conversion failed, for example because of insufficient disk space or memory.
    """
    (state,) = checkpoint.glob("global_step*")
    folder = output_dir / f"{UNFINISHED}universal-{checkpoint.name}"
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    shares_disk = sees_the_same(output_dir, accelerator)
    converts = accelerator.is_main_process or (accelerator.is_local_main_process and not shares_disk)
    convert(state, folder, converts, accelerator, beat)
    config["checkpoint"] = {"load_universal": True}
    try:
        yield folder
    finally:
        del config["checkpoint"]
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # another machine may have removed it already


def convert(
    state: Path, folder: Path, converts: bool, accelerator: Accelerator, beat: Callable[[], None]
) -> None:
    """Run DeepSpeed's converter on some ranks while all ranks wait for it.

    Args:
        state: DeepSpeed's folder in the checkpoint.
        folder: where to write the universal format.
        converts: whether this rank runs the converter.
        beat: called while it runs.

    Raises:
        UserError: on all ranks, if the converter failed on any.
    """
    failure = None
    with tempfile.TemporaryFile() as errors:
        process = None
        if converts:
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
            process = subprocess.Popen(
                [sys.executable, *CONVERTER, "--input_folder", state, "--output_folder", folder / state.name],
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        wait_until(lambda: process is None or process.poll() is not None, accelerator, beat)
        if process is not None and process.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            failure = lines[-1] if lines else f"exit code {process.returncode}"
        elif process is not None and (scheduler := state.parent / SCHEDULER_NAME).exists():
            shutil.copy(scheduler, folder)  # added by transformers and unknown to the converter
    failure = first_failure(failure)
    if failure is not None:
        raise UserError(
            f"--resume_from_checkpoint {state.parent}: cannot be converted for another number of ranks: "
            f"{failure}"
        )
