"""Agreement of several ranks on the step after which they stop, and how long it makes them wait."""

import threading
from types import SimpleNamespace

import pytest
import torch

from dft.training.parallel import stopping
from dft.training.parallel.stopping import StopControl, StopRequest
from scripts.bench.bench_waits import HostWaits

SIGTERM = 15


@pytest.fixture
def exchange(monkeypatch):
    """Let two threads be the ranks, on a device that computes while the host continues."""
    barrier, numbers = threading.Barrier(2, timeout=60), {}

    def all_reduce(tensor, op):
        numbers[threading.get_ident()] = float(tensor.numpy())
        barrier.wait()
        largest = max(numbers.values())
        barrier.wait()
        tensor.fill_(largest)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(stopping, "DEVICE_TYPES", frozenset({"cpu"}))
    return numbers


def new_control():
    request = StopRequest()
    return request, StopControl(request, SimpleNamespace(num_processes=2, device=torch.device("cpu")))


def steps_until_stop(signals, events=()):
    """Return the step after which each rank stops.

    Args:
        signals: for each rank, the step during which it receives a signal, or None.
        events: steps that end with an evaluation or a line of the log.
    """
    stopped = [0, 0]

    def run(rank):
        request, control = new_control()
        for step in range(1, 11):
            if step == signals[rank]:
                request.number = SIGTERM
            asked = control.is_requested() if step in events else control.is_requested_between_events()
            if asked:
                stopped[rank] = step
                assert str(control.stopped(step, None)) == f"stopped by SIGTERM after step {step}"
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stopped


@pytest.mark.parametrize(
    ("signals", "events", "expected"),
    [
        ((4, None), (), 5),
        ((None, 4), (), 5),
        ((7, 3), (), 4),
        ((4, 4), (), 5),
        ((4, None), (4,), 4),  # the device is waited for in any case
        ((4, None), (3, 5), 5),
        ((4, None), (3,), 5),
    ],
)
def test_ranks_stop_after_the_same_step_and_at_most_one_step_late(exchange, signals, events, expected):
    assert steps_until_stop(signals, events) == [expected, expected]


def test_between_events_only_the_number_of_the_step_before_is_read(exchange, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    _, control = new_control()
    waits = HostWaits()
    with waits.counting():
        control.is_requested_between_events()
        assert waits.take() == ({}, 0)
        control.is_requested_between_events()
        assert waits.take() == ({}, 1)
        control.is_requested()
        places, late = waits.take()
    assert places.total() == 1 and late == 0


def test_on_a_cpu_ranks_stop_after_the_current_step(exchange, monkeypatch):
    """There is no device to wait for."""
    monkeypatch.setattr(stopping, "DEVICE_TYPES", frozenset({"cuda"}))
    assert steps_until_stop((None, 4)) == [4, 4]
