"""Work spread over processes, in order, with little of it in memory at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from dft.errors import UserError

About, Task, Result = TypeVar("About"), TypeVar("Task"), TypeVar("Result")
AHEAD = 4
"""Tasks per worker that are read ahead: enough to keep all of them busy, few enough to fit in memory."""


def in_processes(
    tasks: Iterable[tuple[About, Task]],
    function: Callable[..., Result],
    shared: tuple[Any, ...],
    workers: int,
) -> Iterator[tuple[About, Result]]:
    """`(about, function(*shared, task))` for each `(about, task)`, in order.

    Raises:
        UserError: a process was killed. What `function` raises is raised here.
    """
    # fork shares the loaded tokenizer, and the children run nothing of torch. Fresh interpreters would each
    # have to import transformers first.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function, shared))
    waiting: deque[tuple[About, Future[Result]]] = deque()
    try:
        for about, task in tasks:
            waiting.append((about, pool.submit(_work, task)))
            if len(waiting) >= AHEAD * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, most likely for lack of memory; "
            f"lower --preprocessing_num_workers (now {workers})"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_per_process() -> Iterator[None]:
    """The tokenizer's own threads are off: processes are the parallelism, and forking threads may hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_function: Callable[..., Any]
_shared: tuple[Any, ...]


def _start_worker(function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    global _function, _shared
    _function, _shared = function, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Any) -> Any:
    return _function(*_shared, task)
