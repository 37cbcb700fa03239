"""The one exception a user should ever see, and how it reaches the terminal."""

import os
import signal
import sys
import time
import traceback
from types import FrameType, TracebackType
from typing import NoReturn

RANK_ZERO_DELAY = 30
"""Seconds that other ranks leave rank 0 to report the same mistake before they report it themselves."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a program that Ctrl-C ended, as shells count it."""
EXIT_USER_ERROR = 2
"""Exit code after a `UserError`: the same command would end in the same way."""


_tells: bool | None = None


class UserError(ValueError):
    """Something the user gave cannot work. The message names the value, the reason and the remedy.

    Attributes:
        code: with which the program ends.
    """

    code = EXIT_USER_ERROR


def report_user_errors() -> None:
    """Make an uncaught `UserError` print as one message instead of a traceback, and exit with its code, 2.

    Most mistakes (flags, files, models) meet every rank of a node, so the first one speaks for all. The
    others wait for the launcher to end them, which it does as soon as one rank fails: a rank that left at
    once would get rank 0 killed before its message is out. If nobody ends them, the fault was theirs alone,
    and they say so.

    Ctrl-C is one line as well, and exit code 130.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one does not wait for what ends in order
            _say_interrupted()
            raise SystemExit(EXIT_INTERRUPTED)
        if not issubclass(kind, UserError):
            _print_traceback(kind, error, trace)
            return
        local_rank = _local_rank()
        prefix = f"[rank {os.environ.get('RANK', local_rank)}] " if local_rank else ""
        if _tells is False or (local_rank and _tells is None):
            time.sleep(RANK_ZERO_DELAY)
        if _tells is not False:
            # Not to sys.stderr: torch's hook in front of this one holds that back, and drops it at an exit.
            print(f"{prefix}error: {error}", file=sys.__stderr__, flush=True)
        raise SystemExit(error.code)

    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup or a notebook
        signal.signal(signal.SIGINT, _interrupt)


def set_error_reporter(told_by_me: bool) -> None:
    """Settles who reports an error, where the ranks have agreed on that, instead of by number and time."""
    global _tells
    _tells = told_by_me


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own, each line under its rank where there are several."""
    lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
    tag = rank_tag()
    print("\n".join(tag + line for line in lines), file=sys.stderr, flush=True)


def rank_tag() -> str:
    """What a line of this process begins with, so that a log of several ranks can be read."""
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """Ends the program in order, which a second Ctrl-C must not disturb half-way but cut short."""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


def _interrupt_again(_number: int, _frame: FrameType | None) -> NoReturn:
    _say_interrupted()
    os._exit(EXIT_INTERRUPTED)


def _say_interrupted() -> None:
    if _local_rank() == 0:
        os.write(2, b"interrupted\n")  # print may not be entered again by a signal handler


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: must be one of {', '.join(choices)}")
