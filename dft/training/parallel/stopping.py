"""Being asked to stop: by Ctrl-C, by SIGTERM, by the notice a cluster gives before it takes the machine."""

import os
import signal
from types import FrameType

from dft.errors import EXIT_INTERRUPTED
from dft.ranks import is_main_process

STOPPED = 75
"""Exit code of a run that stopped because it was asked to, with nothing lost: the same command goes on.

EX_TEMPFAIL of sysexits.h, "the user is invited to retry". Under several ranks every one ends with it.
"""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what SLURM's --signal and others send some time before the end. SIGINT joins when training
begins; until then Ctrl-C ends the program at once (`dft.errors`)."""


class Stopped(Exception):
    """Training ended before its time because it was asked to, and everything is saved.

    Attributes:
        checkpoint: the folder to go on from; None where nothing has been trained yet.
    """

    def __init__(self, signal_name: str, step: int, checkpoint: str | None) -> None:
        super().__init__(f"stopped by {signal_name} after step {step}")
        self.checkpoint = checkpoint


class StopRequest:
    """Whether this process was asked to stop. The trainer looks at it when a step is done.

    Attributes:
        number: of the signal; 0 without one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()
        self._is_training = False

    def listen(self) -> None:
        """Until training begins there is nothing to save, so a signal ends the program at once."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def begin_training(self) -> None:
        """From now on the step that is being made is finished and saved first."""
        self._is_training = True
        self.listen()
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a job that a shell put aside
            signal.signal(signal.SIGINT, self._note)

    def end_training(self) -> None:
        """From now on a signal ends the program as if it had not been listened for."""
        self._is_training = False
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked, and is not asked to save anything
            if number == signal.SIGINT:
                return  # Ctrl-C reaches all processes of a terminal; the parent ends its workers itself
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if not self._is_training:
            _tell(f"stopped by {name} before training began; the same command starts again")
            raise SystemExit(STOPPED)
        if number == signal.SIGINT and self.number == signal.SIGINT:
            _tell("interrupted again: ends at once, without a checkpoint of this step")
            os._exit(EXIT_INTERRUPTED)
        if not self.number:
            again = " (Ctrl-C again ends it at once)" if number == signal.SIGINT else ""
            _tell(f"{name}: finishing this step, then saving a checkpoint and ending{again}")
            self.number = number


def _tell(line: str) -> None:
    if is_main_process():
        os.write(2, f"{line}\n".encode())  # print may not be entered again by a signal handler
