"""Settings of a run that are neither training arguments nor settings of the loss."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import TrainerState

from dft.metrics import CONSOLE
from dft.training.early_stopping import EarlyStopping
from dft.training.parallel.stopping import StopRequest
from dft.training.parallel.waiting import Heartbeat


@dataclass(frozen=True)
class RunOptions:
    """Settings of a run from the entry script. The defaults suit library use of the trainer.

    Attributes:
        stop: signals that ask the run to save a checkpoint and stop; None if no signal does.
        heartbeat: reports progress to the watchdog over the other ranks.
        requested_batch: (rows per device, accumulation steps) as requested by the user; if set, running out
            of memory records a smaller batch for the next attempt (`--auto_find_batch_size`).
        card: returns the text of a saved model's README.md, given the trainer's state, the step of the
            weights, and whether the picture of the report is in the same folder; None to not write a card.
        verify_save: "True" reloads the final model and reads the files of checkpoints, "all" reloads both,
            "False" disables the check.
        trust_remote_code: whether to run code that comes with the model when it is reloaded.
        trust_checkpoint: whether to resume from a checkpoint that other users can write to.
        ema_decay: factor of the previous value in the exponential moving average of the weights, which
            evaluations and the final model use; None for no average.
        console_metrics: names of the metrics that the console shows (see `dft.metrics`).
        early_stopping: ends the run when evaluations no longer improve; None to not do that.
        log_artifacts: whether artifacts are logged to trackers after training, so their runs stay open.
        model_files: names of the files of the final model, filled when it is saved.
        new_tokens: tokens that were added to the vocabulary of the model, in the order of their ids.
    """

    stop: StopRequest | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    requested_batch: tuple[int, int] | None = None
    card: Callable[[TrainerState, int, bool], str] | None = None
    verify_save: str = "True"
    trust_remote_code: bool = False
    trust_checkpoint: bool = False
    ema_decay: float | None = None
    console_metrics: tuple[str, ...] = CONSOLE
    early_stopping: EarlyStopping | None = None
    log_artifacts: bool = False
    model_files: list[str] = field(default_factory=list)
    new_tokens: tuple[str, ...] = ()
