"""The log of a run as time series of metrics and histograms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dft import metrics
from dft.metrics import EVAL, HIGHER, LOWER, Metric

Log = Sequence[dict[str, Any]]
"""`log_history` of the trainer's state: records with a `step` and the values that were logged at it."""


@dataclass(frozen=True)
class Series:
    """A metric over the steps of a run.

    Attributes:
        steps: (records,) int64, optimizer steps.
        values: (records,) float64; some may be NaN or infinite.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> np.ndarray:
        """Mask of the finite values, (records,) bool."""
        return np.isfinite(self.values)

    @property
    def first(self) -> float | None:
        return float(self.values[0]) if len(self) else None

    @property
    def last(self) -> float | None:
        return float(self.values[-1]) if len(self) else None

    def best(self, metric: Metric) -> tuple[float, int] | None:
        """Return the best value and its step; None if no value is finite or the metric has no best."""
        if metric.better is None or not self.finite.any():
            return None
        sign = 1 if metric.better == HIGHER else -1
        index = int(np.argmax(np.where(self.finite, sign * self.values, -np.inf)))
        return float(self.values[index]), int(self.steps[index])

    def thinned(self, limit: int) -> "Series":
        """Return a series of at most `limit` means over consecutive records.

        Non-finite values are excluded from a mean unless there are no other values.
        """
        if len(self) <= limit:
            return self
        chunks = np.array_split(np.arange(len(self)), limit)
        averaged = [chunk[self.finite[chunk]] if self.finite[chunk].any() else chunk for chunk in chunks]
        return Series(
            np.array([self.steps[chunk[-1]] for chunk in chunks]),
            np.array([self.values[chunk].mean() for chunk in averaged]),
        )


def series(log: Log, key: str) -> Series:
    """Return the values logged under a key; records without it, or where it is not a number, are skipped."""
    records = [record for record in log if isinstance(record.get(key), int | float)]
    return Series(
        np.array([record.get("step", 0) for record in records], dtype=np.int64),
        np.array([record[key] for record in records], dtype=np.float64),
    )


@dataclass(frozen=True)
class Histogram:
    """Histogram of the supervised tokens of one evaluation by their probability p.

    Attributes:
        step: optimizer step of the evaluation.
        counts: (bins,) int64, tokens in equal parts of [0, 1].
    """

    step: int
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Shares of the tokens, (bins,) float64; all 0 if there are no tokens."""
        return self.counts / max(self.counts.sum(), 1)

    @property
    def edges(self) -> np.ndarray:
        """Edges of the bins, (bins + 1,) float64."""
        return np.linspace(0, 1, len(self.counts) + 1)

    def between(self, low: float, high: float) -> float:
        """Return the share of the tokens in the bins between two values of p."""
        centers = (self.edges[1:] + self.edges[:-1]) / 2
        return float(self.shares[(centers > low) & (centers < high)].sum())


def histograms(log: Log, prefix: str = EVAL) -> list[Histogram]:
    """Return the histograms of the first and the last evaluation, or the only one.

    Args:
        log: the log of the run.
        prefix: prefix of the metrics of the evaluation set.
    """
    key = prefix + metrics.HISTOGRAM
    logged = [
        Histogram(record.get("step", 0), np.array(record[key], dtype=np.int64))
        for record in log
        if record.get(key)
    ]
    return [logged[0], logged[-1]] if len(logged) > 1 else logged


def first_and_last_histogram(log: Log, prefix: str = EVAL) -> tuple[Histogram | None, Histogram] | None:
    """Return the histograms of p of the first (None if it is the only one) and of the last evaluation."""
    logged = histograms(log, prefix)
    if not logged:
        return None
    return (logged[0] if len(logged) > 1 else None), logged[-1]


def main_prefix(log: Log) -> str:
    """Return the prefix of the metrics of the first evaluation set."""
    return next(iter(metrics.evaluation_prefixes(log)), EVAL)


def set_title(prefix: str) -> str:
    """Return the heading of an evaluation set, given the prefix of its metrics."""
    return "Evaluation" if prefix == EVAL else f"Evaluation on {prefix.removeprefix(EVAL).rstrip('_')}"


def file_series(log: Log) -> dict[str, dict[Metric, Series]]:
    """Return the metrics of each data file, which evaluations log as `eval_<file>/<metric>`."""
    files: dict[str, dict[Metric, Series]] = {}
    for key in dict.fromkeys(key for record in log for key in record if key.startswith(EVAL)):
        name, _, metric = key.removeprefix(EVAL).rpartition("/")
        if name and metric in metrics.BY_NAME:
            files.setdefault(name, {})[metrics.BY_NAME[metric]] = series(log, key)
    return files


def nonfinite_steps(log: Log) -> dict[str, list[int]]:
    """Return, by key, the steps at which NaN or infinity was logged."""
    keys = dict.fromkeys(key for record in log for key in record)
    logged = {key: series(log, key) for key in keys}
    return {
        key: values.steps[~values.finite].tolist()
        for key, values in logged.items()
        if not values.finite.all()
    }


def best_of(values: Sequence[float | None], metric: Metric) -> list[bool]:
    """Mark the best of the values of several runs; none if fewer than two are finite."""
    finite = [value for value in values if value is not None and np.isfinite(value)]
    if metric.better is None or len(finite) < 2:
        return [False] * len(values)
    best = min(finite) if metric.better == LOWER else max(finite)
    return [value == best for value in values]
