"""The one exception a user should ever see, and how it reaches the terminal."""

import os
import sys
import time
from types import TracebackType

PATIENCE = 30
"""Seconds that other ranks leave rank 0 to report the same mistake before they report it themselves."""


class UserError(ValueError):
    """Something the user gave cannot work. The message names the value, the reason and the remedy."""


def report_user_errors() -> None:
    """Make an uncaught `UserError` print as one message instead of a traceback. The exit code stays 1.

    Most mistakes (flags, files, models) meet every rank of a node, so the first one speaks for all. The
    others wait for the launcher to end them, which it does as soon as one rank fails: a rank that left at
    once would get rank 0 killed before its message is out. If nobody ends them, the fault was theirs alone,
    and they say so.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, UserError):
            sys.__excepthook__(kind, error, trace)
            return
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        prefix = ""
        if local_rank != 0:
            time.sleep(PATIENCE)
            prefix = f"[rank {os.environ.get('RANK', local_rank)}] "
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)

    sys.excepthook = hook
