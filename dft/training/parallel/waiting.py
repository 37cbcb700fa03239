"""Wait for slow work on one rank without triggering timeouts on the others."""

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from dft.training.parallel.rank_watchdog import RankWatchdog

PERIOD = 1.0
"""Seconds between two checks whether all ranks are done."""


class Heartbeat:
    """Reports the progress of this rank to the rank watchdog, once there is one.

    Attributes:
        watchdog: `dft.training.parallel.rank_watchdog.watch_ranks` yields it; None with a single rank.
    """

    def __init__(self) -> None:
        self.watchdog: RankWatchdog | None = None

    def beat(self) -> None:
        """Report that this rank is making progress."""
        if self.watchdog is not None:
            self.watchdog.beat()


def wait_until(
    is_done: Callable[[], bool], accelerator: Accelerator, beat: Callable[[], None], period: float = PERIOD
) -> None:
    """Wait until `is_done` returns True on every rank. All ranks must call it.

    A rank that waited in a barrier for an upload or a conversion by another rank would hit the timeout of
    the process group (`--ddp_timeout`), and the watchdog would report a rank that hangs. Here the ranks
    exchange a flag every `period` seconds, so no collective lasts longer than that.

    Args:
        is_done: must not raise, or the other ranks would wait forever.
        beat: called once per period, see `Heartbeat.beat`.
    """
    while True:
        beat()
        done = is_done()
        if accelerator.num_processes > 1:
            flag = torch.tensor([done], dtype=torch.int32, device=accelerator.device)
            done = bool(accelerator.gather(flag).all())
        if done:
            return
        time.sleep(period)
