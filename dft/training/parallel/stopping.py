"""Save a checkpoint and stop when a signal arrives: Ctrl-C, SIGTERM, or a cluster's notice."""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

from dft.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from dft.ranks import is_main_process

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is sent by SLURM's --signal and others some time before the end. SIGINT is added when training
begins; until then Ctrl-C ends the program immediately (`dft.errors`)."""
BATCHES_PER_CHECK = 10
"""Batches of an evaluation between two checks of the stop signal, each of which waits for the device."""


class Stopped(Exception):
    """Raised when a signal stopped training early, after everything was saved.

    Attributes:
        checkpoint: the folder to resume from; None if no step was completed.
    """

    def __init__(self, signal_name: str, step: int, checkpoint: str | None) -> None:
        super().__init__(f"stopped by {signal_name} after step {step}")
        self.checkpoint = checkpoint


class StoppedEvaluation(Exception):
    """Raised on all ranks when an evaluation is cut short because the run was asked to stop."""


class StopRequest:
    """Listens for the signals that ask this process to stop.

    Attributes:
        number: the signal that was received; 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()
        self._is_training = False

    def listen(self) -> None:
        """Listen for signals. Before training they end the program, because there is nothing to save."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def begin_training(self) -> None:
        """Make signals save a checkpoint after the current step."""
        self._is_training = True
        self.listen()
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored by background jobs of a shell
            signal.signal(signal.SIGINT, self._note)

    def end_training(self) -> None:
        """Restore the default effect of signals."""
        self._is_training = False
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker has nothing to save
            if number == signal.SIGINT:
                return  # Ctrl-C reaches all processes of a terminal; the parent ends its workers itself
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if not self._is_training:
            _print_line(f"stopped by {name} before training began; the same command starts again")
            raise SystemExit(EXIT_STOPPED)
        if number == signal.SIGINT and self.number == signal.SIGINT:
            _print_line("interrupted again: exiting immediately, without a checkpoint of this step")
            os._exit(EXIT_INTERRUPTED)
        if not self.number:
            again = " (press Ctrl-C again to exit immediately)" if number == signal.SIGINT else ""
            _print_line(f"{name}: finishing this step, then saving a checkpoint and ending{again}")
            self.number = number


class StopControl:
    """Decides with all ranks whether to stop, so that they stop after the same step.

    Args:
        request: the signals of this rank; None if no signal stops the run.
        accelerator: the run's accelerator.
    """

    def __init__(self, request: StopRequest | None, accelerator: Accelerator) -> None:
        self._request = request
        self._accelerator = accelerator
        self._signal_name = ""
        self._evaluated_batches = 0

    def begin_training(self) -> None:
        """Make signals stop the run with a checkpoint."""
        if self._request is not None:
            self._request.begin_training()

    def is_requested(self) -> bool:
        """Return whether any rank was asked to stop. All ranks must call it."""
        if self._request is None:
            return False
        number = self._request.number
        if self._accelerator.num_processes > 1:
            numbers = torch.tensor([number], device=self._accelerator.device)
            number = int(self._accelerator.gather(numbers).max().item())
        self._signal_name = signal.Signals(number).name if number else ""
        return bool(number)

    def stop_evaluation_if_requested(self) -> None:
        """Count a batch of an evaluation, and end the evaluation if the run was asked to stop.

        All ranks must call it once per batch. They exchange the signal every `BATCHES_PER_CHECK` batches.

        Raises:
            StoppedEvaluation: a rank was asked to stop.
        """
        self._evaluated_batches += 1
        if self._evaluated_batches % BATCHES_PER_CHECK == 0 and self.is_requested():
            raise StoppedEvaluation

    def stopped(self, step: int, checkpoint: str | None) -> Stopped:
        """Return the exception that ends the run after `step`, saved in `checkpoint`."""
        return Stopped(self._signal_name, step, checkpoint)


def _print_line(line: str) -> None:
    if is_main_process():
        os.write(2, f"{line}\n".encode())  # print is not reentrant in a signal handler
