"""Worker processes: order of results, exceptions, killed workers, and a time limit in CPU seconds."""

import os
import signal
import time
from contextlib import closing

import pytest

from dft.data.sandbox import limits
from dft.data.sandbox.workers import WorkerLost, map_in_processes


def square(offset: int, task: int) -> int:
    time.sleep(0.01 * (task % 3))
    return offset + task * task


def fail_at_three(task: int) -> int:
    if task == 3:
        raise ValueError("task 3")
    return task


def kill_itself(task: int) -> None:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def compute_or_sleep(task: str) -> str:
    limits.start_cpu_timer()
    while task == "compute":
        pass
    time.sleep(0.5)
    limits.stop_cpu_timer()
    return task


def results(function, tasks, *shared, workers: int = 2) -> list:
    return list(map_in_processes(((str(task), task) for task in tasks), function, shared, workers))


def test_results_come_in_the_order_of_the_tasks():
    assert results(square, range(40), 5) == [(str(task), 5 + task * task) for task in range(40)]


def test_an_exception_of_the_function_is_raised_after_the_results_before_it():
    with closing(map_in_processes(((n, n) for n in range(9)), fail_at_three, (), 1)) as iterator:
        assert [next(iterator) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
        with pytest.raises(ValueError, match="task 3"):
            next(iterator)


def test_a_killed_worker_is_reported_with_its_task():
    with pytest.raises(WorkerLost) as caught:
        results(kill_itself, range(2, 5), workers=1)
    assert (caught.value.task, caught.value.out_of_time) == (2, False)


def test_the_time_limit_counts_cpu_time_and_not_waiting(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CPU_SECONDS", 0.1)
    assert results(compute_or_sleep, ["sleep"]) == [("sleep", "sleep")]
    with pytest.raises(WorkerLost) as caught:
        results(compute_or_sleep, ["compute"])
    assert (caught.value.task, caught.value.out_of_time) == ("compute", True)
