"""The one exception a user should ever see, and how it reaches the terminal."""

import os
import sys
from types import TracebackType


class UserError(ValueError):
    """Something the user gave cannot work. The message names the value, the reason and the remedy.

    Raised only where every rank of a node meets the same fault (flags, files, models), so that printing it
    once per node is enough.
    """


def report_user_errors() -> None:
    """Make an uncaught `UserError` print as one message instead of a traceback. The exit code stays 1.

    Every rank still ends with the exit code of a failure; only the first of each node prints, so that eight
    GPUs do not repeat one mistake eight times.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, UserError):
            sys.__excepthook__(kind, error, trace)
        elif int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)

    sys.excepthook = hook
