"""A DeepSpeed checkpoint of some number of ranks, for another number of them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.trainer import SCHEDULER_NAME

from dft.errors import UserError
from dft.training.checkpoints.folder import UNFINISHED


@contextmanager
def resharded(checkpoint: Path, output_dir: Path, accelerator: Accelerator) -> Iterator[Path]:
    """DeepSpeed's universal form of a checkpoint, as long as it is needed; it takes as much disk again.

    The converter is a program of DeepSpeed's, run on one process of each machine. Within the context the
    engine of this run is set up to load that form.

    Raises:
        UserError: the converter fails, for want of disk or memory for example.
    """
    (state,) = checkpoint.glob("global_step*")
    folder = output_dir / f"{UNFINISHED}universal-{checkpoint.name}"
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    with accelerator.local_main_process_first():
        if not (folder / "latest_universal").exists():  # on a shared disk the first machine has made it
            convert(state, folder / state.name)
            scheduler = checkpoint / SCHEDULER_NAME
            if scheduler.exists():  # the schedule is transformers', not one of DeepSpeed's file
                shutil.copy(scheduler, folder)
    config["checkpoint"] = {"load_universal": True}
    try:
        yield folder
    finally:
        del config["checkpoint"]
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # the other machine may have been quicker


def mend_zero3(optimizer: Any, folder: Path) -> None:
    """Puts right what DeepSpeed 0.19 loads wrongly under ZeRO-3, without which it would not go on as it was.

    All groups of parameters get the options of the first one, so weight decay also where there was none; and
    all share one tensor that counts their steps, which then grows by one for each of them.

    Args:
        optimizer: DeepSpeed's, around that of torch.
        folder: the universal form that was loaded.
    """
    (state,) = folder.glob("global_step*/zero/optimizer_state.pt")
    # DeepSpeed's own classes are in it, and it was made of a checkpoint that is trusted.
    saved = torch.load(state, map_location="cpu", weights_only=False)["optimizer_state_dict"]["param_groups"]
    inner: torch.optim.Optimizer = optimizer.optimizer
    for group, options in zip(inner.param_groups, saved, strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
    for kept in inner.state.values():
        if isinstance(kept["step"], torch.Tensor):
            kept["step"] = kept["step"].clone()


def convert(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(target.parent, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"--resume_from_checkpoint {source.parent}: cannot be converted for other ranks: {last}"
        )
