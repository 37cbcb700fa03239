"""Ordered parallel map over worker processes that keeps only a few tasks in memory."""

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from dft.data.sandbox.limits import TIMEOUT_SIGNAL

Label = TypeVar("Label")
Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_AHEAD = 4
"""Tasks per worker that are read ahead: enough to keep all workers busy, few enough to fit in memory."""
TASKS_SENT = 3
"""Tasks that are sent to a worker at once: the current one, and enough to do while the parent is busy."""


class WorkerLost(Exception):
    """Raised when a worker process exits before it has finished its task.

    Attributes:
        task: the task it was working on.
        out_of_time: whether its CPU timer ended it (`dft.data.sandbox.limits`).
    """

    def __init__(self, task: Any, out_of_time: bool) -> None:
        super().__init__(task, out_of_time)
        self.task, self.out_of_time = task, out_of_time


@dataclass
class _Worker:
    """A worker process and the tasks sent to it, the current one first."""

    process: BaseProcess
    tasks: deque[tuple[int, Any]] = field(default_factory=deque)


def map_in_processes(
    tasks: Iterable[tuple[Label, Task]],
    function: Callable[..., Result],
    shared: tuple[Any, ...],
    workers: int,
) -> Generator[tuple[Label, Result], None, None]:
    """Yield `(label, function(*shared, task))` for each `(label, task)`, in order.

    When the iterator is exhausted or closed, or an exception such as KeyboardInterrupt passes through it, the
    worker processes are killed immediately, even in the middle of a task.

    Raises:
        WorkerLost: a worker process was killed. Exceptions of `function` are raised unchanged.
    """
    pool = _Pool()
    pending: deque[tuple[int, Label]] = deque()
    try:
        pool.start(workers, function, shared)
        for number, (label, task) in enumerate(tasks):
            pool.submit(number, task)
            pending.append((number, label))
            if len(pending) >= TASKS_AHEAD * workers:
                first, first_label = pending.popleft()
                yield first_label, pool.result(first)
        for number, label in pending:
            yield label, pool.result(number)
    finally:
        pool.kill()


class _Pool:
    """Worker processes, the tasks not yet sent to them, and the results not yet retrieved.

    An executor of the standard library would wait for its workers to finish. It also communicates with them
    from threads that may hang if a worker dies in the middle of a message. Here, a worker that dies breaks
    only its own pipe.
    """

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self.workers: dict[Connection, _Worker] = {}
        self.tasks: deque[tuple[int, Any]] = deque()
        self.results: dict[int, tuple[BaseException | None, Any]] = {}

    def start(self, workers: int, function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
        # Forked processes share the loaded tokenizer, and they run no torch code. Spawned ones would each
        # have to import transformers first.
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function, shared), daemon=True)
            with _block_interrupts():
                process.start()
                self.processes.append(process)
            theirs.close()  # so that our end gets end-of-file when the worker exits
            self.workers[ours] = _Worker(process)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.workers:
            connection.close()

    def submit(self, number: int, task: Any) -> None:
        self.tasks.append((number, task))
        self._exchange(timeout=0)

    def result(self, number: int) -> Any:
        """Wait for the result of a task and return it, or raise its exception."""
        while number not in self.results:
            self._exchange(timeout=None)
        error, value = self.results.pop(number)
        if error is not None:
            raise error
        return value

    def _exchange(self, timeout: float | None) -> None:
        """Send tasks, receive the results that are ready (waiting up to `timeout`), and send tasks again."""
        self._send_tasks()
        ready = cast(list[Connection], wait(list(self.workers), timeout))
        for connection in ready:
            worker = self.workers[connection]
            try:
                number, result = connection.recv()
            except (EOFError, OSError):
                raise _lost(worker) from None
            self.results[number] = result
            worker.tasks.popleft()
        self._send_tasks()

    def _send_tasks(self) -> None:
        while self.tasks:
            connection, worker = min(self.workers.items(), key=lambda item: len(item[1].tasks))
            if len(worker.tasks) >= TASKS_SENT:
                return
            try:
                connection.send(self.tasks[0])
            except OSError:
                raise _lost(worker) from None
            worker.tasks.append(self.tasks.popleft())


def _lost(worker: _Worker) -> WorkerLost:
    worker.process.join()  # it has closed its end of the pipe and is about to exit
    _, task = worker.tasks[0] if worker.tasks else (None, None)
    return WorkerLost(task, worker.process.exitcode == -TIMEOUT_SIGNAL)


@contextmanager
def without_tokenizer_threads() -> Iterator[None]:
    """Disable the threads of the tokenizers library, because forking a process with threads may hang."""
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


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT. A process forked in this context never receives it; the parent handles Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    """Process tasks until killed. This is the main function of a worker process.

    One thread receives tasks, another processes them and this one sends results, so that neither side blocks
    while the other is writing.
    """
    signal.signal(TIMEOUT_SIGNAL, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    futures: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as executor:

        def receive() -> None:
            while True:
                number, task = connection.recv()
                futures.put((number, executor.submit(function, *shared, task)))

        threading.Thread(target=receive, daemon=True).start()
        while True:
            number, future = futures.get()
            error = future.exception()
            if error is None:
                connection.send((number, (None, future.result())))
            else:  # pickling alone would drop the traceback
                connection.send((number, (ExceptionWithTraceback(error, error.__traceback__), None)))
            del future  # its result may be large


def _exit_with_parent() -> None:
    """Exit when the parent process ends, because a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
