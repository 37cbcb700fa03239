"""The rows and sentences of the sections of a run's page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dft.console import clock
from dft.metrics import ACC, EVAL, MACHINE, NLL, QUALITY, Metric, evaluation_prefixes
from dft.program import program_name
from dft.report.pages.formatting import format_argument, format_number
from dft.report.pages.history import Histogram, Log, Series, nonfinite_steps, series, set_title
from dft.report.terminal.data import data_summary

RANGES = ((0.0, 0.1), (0.1, 0.9), (0.9, 1.0))
"""The ranges of p in the table below its histogram."""
NEAR_ONE = 0.5
"""Minimum alpha at which a simultaneous rise of nll and acc is attributed to DFT."""
MAX_LISTED_STEPS = 8
"""Number of steps that a sentence lists."""
RUN_FILES = {
    "model.safetensors": "the model; AutoModelForCausalLM.from_pretrained loads this folder",
    "model.safetensors.index.json": "the model; AutoModelForCausalLM.from_pretrained loads this folder",
    "adapter_model.safetensors": "the adapters",
    "report.json": "the data of this page",
    "trainer_state.json": "all logged values and the best step",
    "log.jsonl": "the logged values, a line for each record, written while the run goes on",
    "run_args.yaml": f"the flags; {program_name()} --config run_args.yaml --output_dir NEW repeats the run",
    "data_report.json": "how many conversations were read, used, truncated and dropped",
    "rejected.jsonl": "lines that could not be used, with the reasons",
    "samples.jsonl": "what the model wrote after prompts of the evaluation data, at each evaluation",
    "preflight.json": "scores of the model on the data before training",
}
"""Files that a run may write, with their descriptions."""

Row = tuple[str, str]


def method(report: Mapping[str, Any]) -> str:
    """Return the method with its alpha, such as `DFT, alpha 0.7`; empty if it is not recorded."""
    if report["method"] is None:
        return ""
    return report["method"] + ("" if report["alpha"] is None else f", alpha {report['alpha']:g}")


def summary_rows(report: Mapping[str, Any], folder: Path) -> list[Row]:
    """Return the method, model, steps, folder and time of a run, if recorded."""
    model, steps = report["model"], report["steps"]
    rows = []
    if name := method(report):
        weight = f"; token weight: {report['weight']}" if report["weight"] else ""
        rows.append(("method", name + weight))
    if model:
        parts = [model.get("name", "")]
        if "parameters" in model:
            parts.append(f"{model['parameters'] / 1e6:,.1f} M parameters")
        parts += [f"{model[key]} {key}" for key in ("weights", "attention") if key in model]
        rows.append(("model", ", ".join(part for part in parts if part)))
    if steps:
        share = 100 * steps["done"] / max(steps["total"], 1)
        rows.append(("steps", f"{steps['done']:,} of {steps['total']:,} ({share:.0f} %)"))
    rows.append(("folder", str(folder.absolute())))
    if report["updated"]:
        rows.append(("updated", report["updated"].replace("T", " ")))
    return rows


def existing_files(folder: Path) -> list[Row]:
    """Return the files of a run that are in its folder, with their descriptions."""
    rows = [(name, meaning) for name, meaning in RUN_FILES.items() if (folder / name).is_file()]
    checkpoints = sorted(
        (path.name for path in folder.glob("checkpoint-*") if path.is_dir()),
        key=lambda name: (len(name), name),
    )
    if checkpoints:
        rows.append(
            (", ".join(checkpoints), "checkpoints; --resume_from_checkpoint auto resumes from the last one")
        )
    return rows


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return the remarks at the top of the page: missing, non-finite and unexpected values."""
    log = report["log"]
    remarks = []
    if not log:
        remarks.append("No metrics have been logged yet.")
    for key, steps in nonfinite_steps(log).items():
        listed = ", ".join(f"{step:,}" for step in steps[:MAX_LISTED_STEPS])
        more = f" and {len(steps) - MAX_LISTED_STEPS:,} more" if len(steps) > MAX_LISTED_STEPS else ""
        remarks.append(f"{key} is NaN or infinite at step {listed}{more} (a cross in its figure).")
    if log and not any(key.startswith(EVAL) for record in log for key in record):
        remarks.append(
            "This run has no evaluation. To evaluate, pass --eval_data_files FILE or "
            "--validation_split_percentage 2 with --eval_strategy steps --eval_steps N; "
            "--eval_on_start True also evaluates the model before training."
        )
    if (report["alpha"] or 0) >= NEAR_ONE:
        rising = (_rising_nll(log, prefix) for prefix in evaluation_prefixes(log))
        remarks += [remark for remark in rising if remark]
    return remarks


def _rising_nll(log: Log, prefix: str) -> str | None:
    """Return an explanation if both nll and acc rose on held-out data."""
    nll, acc = series(log, prefix + NLL.name), series(log, prefix + ACC.name)
    if not all(len(curve) and curve.values[-1] > curve.values[0] for curve in (nll, acc)):
        return None
    of_set = "" if prefix == EVAL else f" of {prefix.removeprefix(EVAL).rstrip('_')}"
    return (
        f"On held-out data{of_set} nll rose from {format_number(nll.first)} to {format_number(nll.last)} "
        f"while acc rose from {format_number(acc.first)} to {format_number(acc.last)}. With alpha near 1 "
        "this is expected: DFT gives up tokens that the model considers very unlikely."
    )


@dataclass(frozen=True)
class LoggedMetric:
    """A metric over a run.

    Attributes:
        metric: the metric.
        series: its logged values.
        best: the best value and its step; None if the metric has no best.
    """

    metric: Metric
    series: Series
    best: tuple[float, int] | None


def logged_metrics(log: Log, prefix: str) -> list[LoggedMetric]:
    """Return the logged metrics of the model.

    Args:
        log: the log of the run.
        prefix: "" for training metrics, "eval_" for evaluation metrics.
    """
    logged = ((metric, series(log, prefix + metric.name)) for metric in QUALITY)
    return [LoggedMetric(metric, values, values.best(metric)) for metric, values in logged if len(values)]


def number_tables(log: Log) -> list[tuple[str, list[LoggedMetric], bool]]:
    """Return the title and the rows of each table of metrics, and whether it is of an evaluation set."""
    tables = [(set_title(prefix), logged_metrics(log, prefix), True) for prefix in evaluation_prefixes(log)]
    tables.append(("Training, means over the logged steps", logged_metrics(log, ""), False))
    return [table for table in tables if table[1]]


def histogram_caption(before: Histogram | None, after: Histogram) -> str:
    """Explain how to read the histogram of p.

    Args:
        before: the histogram of the first evaluation; None if there is only one evaluation.
        after: the histogram of the last evaluation.
    """
    text = (
        "DFT usually polarizes the tokens: most move to p near 1, and some are given up near p = 0. SFT "
        "raises all of them, the unlikely ones most (Figure 2 of the paper). The vertical axis is "
        "logarithmic."
    )
    if before is None:
        return f"{text} Only one evaluation has a histogram so far, at step {after.step:,}."
    if before.step:
        return (
            f"{text} Here “before” is step {before.step:,}; --eval_on_start True also evaluates the model "
            "before training."
        )
    return text


def distribution(histograms: Sequence[Histogram]) -> list[dict[str, Any]]:
    """Return the step, the number of tokens and the formatted shares in `RANGES` of each histogram."""
    return [
        {
            "step": histogram.step,
            "tokens": int(histogram.counts.sum()),
            "shares": [f"{100 * histogram.between(low, high):.1f}\u00a0%" for low, high in RANGES],
        }
        for histogram in histograms
    ]


def data_rows(data: Mapping[str, Any], folder: Path) -> list[Row]:
    """Return the lines of `data_summary` as two columns; empty if the data is not recorded."""
    lines = data_summary(data, str(folder)) if data else []
    return [(line[:12].strip(), line[12:]) for line in lines]


def machine_rows(log: Log) -> list[Row]:
    """Return throughput, memory, number of tokens and durations."""
    rows = [
        _machine_row(metric, values.values[values.finite])
        for metric in MACHINE
        if (values := series(log, metric.name)).finite.any()
    ]
    if len(supervised := series(log, "supervised_tokens")):
        rows.append(("supervised tokens", f"{supervised.values.sum():,.0f} in training"))
    evaluations = [series(log, f"{prefix}runtime").last for prefix in evaluation_prefixes(log)]
    evaluated = [seconds for seconds in evaluations if seconds is not None]
    for seconds, name in (
        (series(log, "train_runtime").last, "run time"),
        (sum(evaluated) if evaluated else None, "last evaluation"),
    ):
        if seconds is not None and math.isfinite(seconds):
            rows.append((name, clock(seconds)))
    left = series(log, "seconds_left").last
    if left and math.isfinite(left) and not len(series(log, "train_runtime")):
        rows.append(("time left", clock(left)))
    return rows


def _machine_row(metric: Metric, values: np.ndarray) -> Row:
    """Format the maximum of a metric in GiB or the median of others; metrics without a unit are shares."""
    name = metric.name.replace("_gib", "").replace("_", " ")
    if metric.unit == "GiB":
        return name, f"{values.max():.2f} GiB"
    median = float(np.median(values))
    return name, f"{format_number(median) if metric.unit else f'{100 * median:.1f} %'} (median)"


def argument_rows(values: Mapping[str, Any]) -> list[Row]:
    """Return names and formatted values of flags."""
    return [(name, format_argument(value)) for name, value in values.items()]
