"""Work spread over processes, in order, with little of it in memory at a time."""

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from dft.data.sandbox.limits import OUT_OF_TIME

About, Task, Result = TypeVar("About"), TypeVar("Task"), TypeVar("Result")
AHEAD = 4
"""Tasks per worker that are read ahead: enough to keep all of them busy, few enough to fit in memory."""
HANDED_OUT = 3
"""Of these, those a worker has itself: the one it works on, and enough to last while the parent writes."""


class WorkerLost(Exception):
    """A process ended before its work.

    Attributes:
        task: what it was doing.
        out_of_time: whether its own clock ended it (`dft.data.sandbox.limits`).
    """

    def __init__(self, task: Any, out_of_time: bool) -> None:
        super().__init__(task, out_of_time)
        self.task, self.out_of_time = task, out_of_time


@dataclass
class _Worker:
    """A process and what it was handed, first the task it works on."""

    process: BaseProcess
    tasks: deque[tuple[int, Any]] = field(default_factory=deque)


def in_processes(
    tasks: Iterable[tuple[About, Task]],
    function: Callable[..., Result],
    shared: tuple[Any, ...],
    workers: int,
) -> Iterator[tuple[About, Result]]:
    """`(about, function(*shared, task))` for each `(about, task)`, in order.

    However it ends, also by Ctrl-C or when the iterator is closed, the processes end with it at once,
    whatever they are working on.

    Raises:
        WorkerLost: a process was killed. What `function` raises is raised here.
    """
    crew = _Crew()
    waiting: deque[tuple[int, About]] = deque()
    try:
        crew.start(workers, function, shared)
        for number, (about, task) in enumerate(tasks):
            crew.give(number, task)
            waiting.append((number, about))
            if len(waiting) >= AHEAD * workers:
                first, done = waiting.popleft()
                yield done, crew.result(first)
        for first, done in waiting:
            yield done, crew.result(first)
    finally:
        crew.end()


class _Crew:
    """Worker processes, what each of them has to do, and what is not handed out or not asked for yet.

    An executor of the standard library would wait for its workers to finish, and talks to them from threads
    that may hang for ever once a worker ends in the middle of a message. Here nothing but the pipe of a
    worker is lost with it.
    """

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self.workers: dict[Connection, _Worker] = {}
        self.tasks: deque[tuple[int, Any]] = deque()
        self.results: dict[int, tuple[BaseException | None, Any]] = {}

    def start(self, workers: int, function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
        # fork shares the loaded tokenizer, and the children run nothing of torch. Fresh interpreters would
        # each have to import transformers first.
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, function, shared), daemon=True)
            with _without_interrupts():
                process.start()
                self.processes.append(process)
            there.close()  # the worker has the only copy, so that its end is seen here
            self.workers[here] = _Worker(process)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.workers:
            connection.close()

    def give(self, number: int, task: Any) -> None:
        self.tasks.append((number, task))
        self._move(timeout=0)

    def result(self, number: int) -> Any:
        """Waits for it."""
        while number not in self.results:
            self._move(timeout=None)
        error, value = self.results.pop(number)
        if error is not None:
            raise error
        return value

    def _move(self, timeout: float | None) -> None:
        """Hands out what there is to do, takes what is done, and hands out again."""
        self._hand_out()
        for connection in wait(list(self.workers), timeout):
            worker = self.workers[connection]
            try:
                number, error, value = connection.recv()
            except (EOFError, OSError):
                raise _lost(worker) from None
            self.results[number] = error, value
            worker.tasks.popleft()
        self._hand_out()

    def _hand_out(self) -> None:
        while self.tasks:
            connection, worker = min(self.workers.items(), key=lambda one: len(one[1].tasks))
            if len(worker.tasks) >= HANDED_OUT:
                return
            try:
                connection.send(self.tasks[0])
            except OSError:
                raise _lost(worker) from None
            worker.tasks.append(self.tasks.popleft())


def _lost(worker: _Worker) -> WorkerLost:
    worker.process.join()  # its end of the pipe is closed, so it is about to be gone
    _, task = worker.tasks[0] if worker.tasks else (None, None)
    return WorkerLost(task, worker.process.exitcode == -OUT_OF_TIME)


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


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits. A process that is forked here never hears of it, as it is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker ----


def _serve(connection: Connection, function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    """Works until it is killed. One thread receives, one works, this one sends: nobody waits for another."""
    signal.signal(OUT_OF_TIME, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    given: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as desk:

        def receive() -> None:
            while True:
                number, task = connection.recv()
                given.put((number, desk.submit(function, *shared, task)))

        threading.Thread(target=receive, daemon=True).start()
        while True:
            number, future = given.get()
            error = future.exception()
            if error is None:
                connection.send((number, None, future.result()))
            else:  # with the lines it came from, which are not here but there
                connection.send((number, ExceptionWithTraceback(error, error.__traceback__), None))
            del future  # a result may be large


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
