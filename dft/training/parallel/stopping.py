"""Save a checkpoint and stop at a signal: Ctrl-C, SIGTERM, a closed terminal, or a cluster's notice."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from dft.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from dft.ranks import is_main_process
from dft.training.host_copy import DEVICE_TYPES, HostCopy

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGUSR1 is sent by SLURM's --signal and others some time before the end, SIGHUP when the terminal closes.
SIGINT is added when training begins; until then Ctrl-C ends the program immediately (`dft.errors`)."""
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Signals that a terminal sends to all of its processes, and that nohup and shells may have ignored."""
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
            if not _is_ignored(number):
                signal.signal(number, self._note)

    def begin_training(self) -> None:
        """Make signals save a checkpoint after the current step."""
        self._is_training = True
        self.listen()
        if not _is_ignored(signal.SIGINT):
            signal.signal(signal.SIGINT, self._note)

    def end_training(self) -> None:
        """Restore the default effect of signals."""
        self._is_training = False
        for number in SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker has nothing to save
            if number in FROM_TERMINAL:
                return  # they reach all processes of a terminal; the parent ends its workers itself
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            ignore_output_errors()
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
        self._exchange: HostCopy | None = None  # begun at the last step and not read yet

    def begin_training(self) -> None:
        """Make signals stop the run with a checkpoint."""
        if self._request is not None:
            self._request.begin_training()

    def is_requested(self) -> bool:
        """Return whether any rank was asked to stop. All ranks must call it."""
        if self._request is None:
            return False
        self._exchange = None
        if self._accelerator.num_processes == 1:
            return self._take(self._request.number)
        return self._take(self._largest_number(self._request.number).item())

    def is_requested_between_events(self) -> bool:
        """Return `is_requested`, on an accelerator that of one step earlier, which waits for no later work.

        All ranks must call it at the end of a step after which nothing is logged, evaluated or saved. The
        numbers of all ranks are exchanged on the device, and read at the end of the next step, when the
        device has computed them. All ranks read the same number, so they stop after the same step.
        """
        request = self._request
        late = self._accelerator.num_processes > 1 and self._accelerator.device.type in DEVICE_TYPES
        if request is None or not late:
            return self.is_requested()
        previous, self._exchange = self._exchange, HostCopy(self._largest_number(request.number))
        return previous is not None and self._take(previous.read())

    def _largest_number(self, number: int) -> torch.Tensor:
        """Return the largest number of all ranks, on the device. Does not wait for it."""
        # Filled on the device, because copying a number to it would synchronize.
        largest = torch.full((), number, dtype=torch.float32, device=self._accelerator.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest

    def _take(self, number: float) -> bool:
        """Remember the name of a signal, and return whether there was one."""
        self._signal_name = signal.Signals(int(number)).name if number else ""
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


def _is_ignored(number: int) -> bool:
    """Return whether nohup, or the shell that started this process, ignores a signal of the terminal."""
    return number in FROM_TERMINAL and signal.getsignal(number) is signal.SIG_IGN


class ClosableOutput:
    """Output stream that ignores errors, because its terminal, or the end of its pipe, may be closed.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_output_errors() -> None:
    """Keep a run from failing because its output can no longer be written."""
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, ClosableOutput) else ClosableOutput(stream)
        for stream in (sys.stdout, sys.stderr)
    )


def _print_line(line: str) -> None:
    if is_main_process():
        with suppress(OSError):  # the terminal may be closed
            os.write(2, f"{line}\n".encode())  # print is not reentrant in a signal handler
