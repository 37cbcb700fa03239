"""What a chat template may take of a machine. Templates come with models, and are programs.

The sandbox they run in keeps them from files and from Python's inner workings, not from loops. Time is
limited by the kernel, which ends the process: one operation of Python, say `10 ** 10 ** 9`, computes for
hours and gives no thread a turn. So templates are rendered in worker processes that may be ended
(`dft.data.sandbox.workers`).
"""

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10
"""Of computing for one rendering, of which there are about two to a turn.

Usual ones take microseconds, and 16 MB of text (the longest conversation that is read) a second. What is
counted is the processor's time, so a busy machine or a paused one changes nothing.
"""
MEMORY = 2 << 30
"""Bytes by which a process may grow while it renders a few conversations, each of at most 64 MB."""
MOST_RENDERED = 64_000_000
"""Characters of one rendering, and of all sequences of a conversation together.

A template that rewrites history makes many sequences of one conversation.
"""
CLOCK = signal.ITIMER_PROF
OUT_OF_TIME = signal.SIGPROF
"""What the clock ends a process with. Nothing else here uses it, unlike SIGALRM."""


class OverLimit(ValueError):
    """A template took more than it may. The message says of what, without the conversation."""


TOO_LONG = f"computes more than {SECONDS} seconds"
TOO_LARGE = f"takes more than {MEMORY >> 30} GiB of memory"
TOO_MUCH_TEXT = f"writes more than {MOST_RENDERED // 1_000_000} million characters"


def start_clock() -> None:
    """Ends this process with `OUT_OF_TIME` unless the clock is stopped in time."""
    signal.setitimer(CLOCK, SECONDS)


def stop_clock() -> None:
    signal.setitimer(CLOCK, 0)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within it this process may not grow by more than `MEMORY`. Linux alone keeps to such a limit.

    Raises:
        OverLimit: it would have.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    wanted = pages * resource.getpagesize() + MEMORY
    lowest = min([wanted, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    except MemoryError:
        raise OverLimit(TOO_LARGE) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
