"""The log of a run, read metric by metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dft import metrics
from dft.metrics import HIGHER, LOWER, Metric

EVAL = "eval_"
HISTOGRAM = f"eval_{metrics.HISTOGRAM}"
PER_FILE = ("nll", "avg_p_correct")
"""Metrics that an evaluation may have for each file, as `eval_<file>/<metric>`."""

Log = Sequence[dict[str, Any]]
"""`log_history` of a Trainer: records with `step` and whatever was logged then."""


@dataclass(frozen=True)
class Series:
    """A metric over the steps of a run.

    Attributes:
        steps: (records,) int64, optimizer steps.
        values: (records,) float64, not all of them finite.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> np.ndarray:
        """(records,) bool"""
        return np.isfinite(self.values)

    @property
    def first(self) -> float | None:
        return float(self.values[0]) if len(self) else None

    @property
    def last(self) -> float | None:
        return float(self.values[-1]) if len(self) else None

    def best(self, metric: Metric) -> tuple[float, int] | None:
        """The best value and its step; None if the metric has no better, or no value is finite."""
        if metric.better is None or not self.finite.any():
            return None
        sign = 1 if metric.better == HIGHER else -1
        index = int(np.argmax(np.where(self.finite, sign * self.values, -np.inf)))
        return float(self.values[index]), int(self.steps[index])

    def thinned(self, limit: int) -> "Series":
        """Means over equal stretches, of at most `limit` records; a stretch with nothing finite stays so."""
        if len(self) <= limit:
            return self
        parts = np.array_split(np.arange(len(self)), limit)
        kept = [part[self.finite[part]] if self.finite[part].any() else part for part in parts]
        return Series(
            np.array([self.steps[part[-1]] for part in parts]),
            np.array([self.values[part].mean() for part in kept]),
        )


def series(log: Log, key: str) -> Series:
    """What was logged under a key. Records without it, or with something else than a number, are left out."""
    found = [record for record in log if isinstance(record.get(key), int | float)]
    return Series(
        np.array([record.get("step", 0) for record in found], dtype=np.int64),
        np.array([record[key] for record in found], dtype=np.float64),
    )


@dataclass(frozen=True)
class Histogram:
    """Supervised tokens of an evaluation by p.

    Attributes:
        step: of the evaluation.
        counts: (bins,) int64, in equal parts of [0, 1].
    """

    step: int
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """(bins,) float64, adding up to 1, or all 0 where nothing was counted."""
        return self.counts / max(self.counts.sum(), 1)

    @property
    def edges(self) -> np.ndarray:
        """(bins + 1,)"""
        return np.linspace(0, 1, len(self.counts) + 1)

    def between(self, low: float, high: float) -> float:
        """Share of the tokens in the bins between two values of p."""
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        return float(self.shares[(centres > low) & (centres < high)].sum())


def histograms(log: Log) -> list[Histogram]:
    """Those of the first and of the newest evaluation that have one; of a single evaluation, one."""
    found = [
        Histogram(record.get("step", 0), np.array(record[HISTOGRAM], dtype=np.int64))
        for record in log
        if record.get(HISTOGRAM)
    ]
    return [found[0], found[-1]] if len(found) > 1 else found


def file_names(log: Log) -> list[str]:
    """Data files that evaluations have metrics of, in the order of the log."""
    ending = f"/{PER_FILE[0]}"
    keys = (key for record in log for key in record if key.startswith(EVAL) and key.endswith(ending))
    return list(dict.fromkeys(key[len(EVAL) : -len(ending)] for key in keys))


def not_finite(log: Log) -> dict[str, list[int]]:
    """By key, the steps at which it was logged as NaN or infinite."""
    keys = dict.fromkeys(key for record in log for key in record)
    found = {key: series(log, key) for key in keys}
    return {key: one.steps[~one.finite].tolist() for key, one in found.items() if not one.finite.all()}


def best_of(values: Sequence[float | None], metric: Metric) -> list[bool]:
    """Which of the values of several runs are the best; none if fewer than two can be compared."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if metric.better is None or len(known) < 2:
        return [False] * len(values)
    best = min(known) if metric.better == LOWER else max(known)
    return [value == best for value in values]
