"""scripts/bench/bench_logging.py: the trainer has the parts that the benchmark switches off."""

import importlib

from dft.training.measuring.meter import TokenMeter
from dft.training.measuring.nonfinite import NonfiniteGuard, StepWatch
from tests.launching import ROOT


def test_metrics_and_the_guard_are_switched_off_and_on_again(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")  # as when the script is run
    without_metrics = importlib.import_module("bench_logging").without_metrics
    before = (TokenMeter.update, StepWatch.add, NonfiniteGuard.handle_gradient)
    with without_metrics():
        during = (TokenMeter.update, StepWatch.add, NonfiniteGuard.handle_gradient)
        assert not set(before) & set(during)
    assert (TokenMeter.update, StepWatch.add, NonfiniteGuard.handle_gradient) == before
