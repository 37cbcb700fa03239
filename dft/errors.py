"""User errors and how they are reported."""

import atexit
import io
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

RANK_ZERO_DELAY = 30
"""Seconds that other ranks wait for rank 0 to report an error before they report it themselves."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as defined by shells."""
EXIT_USER_ERROR = 2
"""Exit code after a `UserError`: the same command would fail in the same way again."""
EXIT_RANK_LOST = 1
"""Exit code of a rank that ends because another rank is missing."""
EXIT_STOPPED = 75
"""Exit code of every rank of a run that was asked to stop. No work is lost: the same command resumes it.
(EX_TEMPFAIL of sysexits.h, "the user is invited to retry".)"""
EXIT_SMALLER_BATCH = 76
"""Exit code of a run that recorded a smaller batch (`--auto_find_batch_size`): run the same command again."""

EXIT_CLOSED_OUTPUT = 128 + signal.SIGPIPE
"""Exit code if nothing reads the output any more, as of programs that do not handle SIGPIPE."""

STDOUT = 1
"""File descriptor of the standard output. `sys.stdout` may be replaced."""

_is_reporter: bool | None = None
"""True if this rank reports its error; None if the ranks have not agreed on a reporter."""


class UserError(ValueError):
    """Error in the user's input. The message names the value, the reason and the remedy.

    Attributes:
        code: exit code of the program.
    """

    code = EXIT_USER_ERROR


class OutputClosed(UserError):
    """Error of a run whose output nothing reads any more."""

    code = EXIT_CLOSED_OUTPUT


def report_user_errors() -> None:
    """Print uncaught `UserError`s as one message without a traceback and exit with code 2.

    Most errors (flags, files, models) occur on every rank of a machine, so only its first rank prints them.
    The others wait until the launcher ends them, which it does as soon as one rank fails. If they exited
    immediately, the launcher would kill rank 0 before it prints its message. If they are not killed in time,
    the error is theirs alone and they print it.

    Ctrl-C prints one line and exits with code 130. If the program that reads the output has ended, as `head`
    does, this one ends without a message. Characters that the encoding of the terminal lacks are
    printed as escapes: a file name or an answer must not end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks replace the streams
            stream.reconfigure(errors="backslashreplace")
    atexit.register(_drop_unread_output)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one exits immediately
            _print_interrupted()
            raise SystemExit(EXIT_INTERRUPTED)
        if issubclass(kind, BrokenPipeError) and output_is_closed():
            raise SystemExit(EXIT_CLOSED_OUTPUT)
        if not isinstance(error, UserError):
            _print_traceback(kind, error, trace)
            return
        local_rank = _local_rank()
        prefix = f"[rank {os.environ.get('RANK', local_rank)}] " if local_rank else ""
        if _is_reporter is False or (local_rank and _is_reporter is None):
            time.sleep(RANK_ZERO_DELAY)
        if _is_reporter is not False:
            # Not sys.stderr: torch's hook, which is called before this one, buffers it and drops the buffer.
            print(f"{prefix}error: {error}", file=sys.__stderr__, flush=True)
        raise SystemExit(error.code)

    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup or in a notebook
        signal.signal(signal.SIGINT, _interrupt)


def output_is_closed() -> bool:
    """Return whether the standard output is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # errors are always reported
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_unread_output() -> None:
    """Write the buffered output, or drop it if nothing reads it, which Python would report at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)


def set_error_reporter(is_reporter: bool) -> None:
    """Set whether this rank reports its error, once the ranks have agreed on a reporter."""
    global _is_reporter
    _is_reporter = is_reporter


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback; with several ranks, each line starts with the rank."""
    lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
    tag = rank_tag()
    print("\n".join(tag + line for line in lines), file=sys.stderr, flush=True)


def rank_tag() -> str:
    """Return the prefix of this rank's lines in the log; empty for a run of one rank."""
    rank = os.environ.get("RANK")  # missing where half of a launcher's environment is left over
    return f"[rank {rank}] " if rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """Handle the first Ctrl-C: shut down cleanly."""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


@contextmanager
def exit_when_interrupted() -> Iterator[None]:
    """Exit at once on Ctrl-C, for imports: libraries catch the `KeyboardInterrupt` and go on without a part.

    It applies to the handler of `report_user_errors` only.
    """
    if signal.getsignal(signal.SIGINT) is not _interrupt:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt_again)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt_again(_number: int, _frame: FrameType | None) -> NoReturn:
    """Handle the second Ctrl-C, or the first during imports: exit immediately."""
    _print_interrupted()
    os._exit(EXIT_INTERRUPTED)


def _print_interrupted() -> None:
    if _local_rank() == 0:
        os.write(2, b"interrupted\n")  # print must not be called in a signal handler


def _local_rank() -> int:
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdecimal() else 0


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if a value is not one of the choices.

    Args:
        name: name of the argument, for the message.
        value: its value.
        choices: allowed values.
    """
    if value not in choices:
        raise ValueError(f"{name} {value!r}: must be one of {', '.join(choices)}")


def describe_loading_error(error: Exception) -> str:
    """Return the type and message of an error that transformers raised while loading a model, as one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    unsupported = re.search(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>", text)
    if unsupported is None:
        return text
    # transformers lists the more than hundred classes that it supports.
    return (
        f"its architecture ({unsupported[1]}) is not one that transformers loads as a causal language model; "
        "of multimodal models, only those are supported whose text part transformers loads, such as Gemma 3 "
        "or Qwen3.5"
    )
