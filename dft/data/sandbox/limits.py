"""Limits on the CPU time, memory and text that a chat template may use.

A chat template is a program that comes with the model. Jinja's sandbox keeps it away from files and from
Python internals but does not stop endless loops. Only the kernel can stop a single long operation such as
`10 ** 10 ** 9`, by ending the process, because Python cannot run another thread in the meantime. Templates
are therefore rendered in worker processes (`dft.data.sandbox.workers`).
"""

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_CPU_SECONDS = 10
"""CPU time of one rendering, in seconds. A conversation takes about two renderings per turn.

An ordinary rendering takes microseconds, and 16 MB of text (the longest conversation that is accepted) takes
a second. CPU time does not pass while other processes run, so the limit holds on a busy machine too.
"""
MAX_MEMORY_GROWTH = 2 << 30
"""Maximum growth in bytes of a process while it renders a few conversations."""
MAX_RENDERED_CHARACTERS = 64_000_000
"""Characters of one rendering, and of all training sequences of a conversation together.

A template that rewrites history makes several sequences of one conversation.
"""
TIMER = signal.ITIMER_PROF
TIMEOUT_SIGNAL = signal.SIGPROF
"""Signal that the timer uses to end a process. Unlike SIGALRM, it has no other use in this project."""


class LimitExceeded(ValueError):
    """Raised when a template exceeds a limit. The message names the limit, not the conversation."""


EXCEEDS_TIME = f"computes more than {MAX_CPU_SECONDS} seconds"
EXCEEDS_MEMORY = f"takes more than {MAX_MEMORY_GROWTH >> 30} GiB of memory"
EXCEEDS_TEXT = f"writes more than {MAX_RENDERED_CHARACTERS // 1_000_000} million characters"


def start_cpu_timer() -> None:
    """Start or restart the timer that ends this process with `TIMEOUT_SIGNAL` at the limit."""
    signal.setitimer(TIMER, MAX_CPU_SECONDS)


def stop_cpu_timer() -> None:
    """Stop the timer of `start_cpu_timer`."""
    signal.setitimer(TIMER, 0)


@contextmanager
def limit_memory() -> Iterator[None]:
    """Limit the growth of this process to `MAX_MEMORY_GROWTH` within the context. Effective on Linux only.

    Raises:
        LimitExceeded: an allocation failed.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    lowest = min([pages * resource.getpagesize() + MAX_MEMORY_GROWTH, *limits])
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    except MemoryError:
        raise LimitExceeded(EXCEEDS_MEMORY) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
