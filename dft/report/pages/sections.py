"""What the parts of a run's page say, as rows and sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dft.console import clock
from dft.metrics import ACC, MACHINE, NLL, QUALITY, Metric
from dft.report.pages.formatting import format_argument, format_number
from dft.report.pages.history import EVAL, PER_FILE, Histogram, Log, Series, file_names, not_finite, series
from dft.report.terminal.data import data_summary

RANGES = ((0.0, 0.1), (0.1, 0.9), (0.9, 1.0))
"""Of p, in the table below its histogram."""
NEAR_ONE = 0.5
"""Alpha from which a rise of nll beside that of acc is put down to the method."""
STEPS_TOLD = 8
"""Steps that a sentence lists."""
FILES = {
    "model.safetensors": "the model; AutoModelForCausalLM.from_pretrained loads this folder",
    "model.safetensors.index.json": "the model; AutoModelForCausalLM.from_pretrained loads this folder",
    "adapter_model.safetensors": "the adapter",
    "report.json": "what this page is made of",
    "trainer_state.json": "every logged value, the best step",
    "run_args.yaml": "the flags; train_dft.py --config run_args.yaml --output_dir NEW repeats the run",
    "data_report.json": "what was read, kept, cut and dropped",
    "rejected.jsonl": "lines that could not be used, and why",
    "preflight.json": "what the untouched model thinks of the data",
}
"""That a run may leave behind."""

Row = tuple[str, str]


def method(report: Mapping[str, Any]) -> str:
    """`DFT, alpha 0.7`; empty where it is not known."""
    if report["method"] is None:
        return ""
    return report["method"] + ("" if report["alpha"] is None else f", alpha {report['alpha']:g}")


def facts(report: Mapping[str, Any], folder: Path) -> list[Row]:
    """What was run; what is not known is left out."""
    model, steps = report["model"], report["steps"]
    rows = []
    if told := method(report):
        weight = f": a token weighs {report['weight']}" if report["weight"] else ""
        rows.append(("method", told + weight))
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
        rows.append(("as of", report["updated"].replace("T", " ")))
    return rows


def files_there(folder: Path) -> list[Row]:
    """What of a run's files lies in its folder, and what it is."""
    rows = [(name, meaning) for name, meaning in FILES.items() if (folder / name).is_file()]
    checkpoints = sorted(
        (place.name for place in folder.glob("checkpoint-*") if place.is_dir()),
        key=lambda name: (len(name), name),
    )
    if checkpoints:
        rows.append(
            (", ".join(checkpoints), "checkpoints; --resume_from_checkpoint True goes on from the last")
        )
    return rows


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader should know before the numbers."""
    log = report["log"]
    said = []
    if not log:
        said.append("Nothing is logged yet.")
    for key, steps in not_finite(log).items():
        told = ", ".join(f"{step:,}" for step in steps[:STEPS_TOLD])
        more = f" and {len(steps) - STEPS_TOLD:,} more" if len(steps) > STEPS_TOLD else ""
        said.append(f"{key} is not finite at step {told}{more} (a cross in its figure).")
    if log and not any(key.startswith(EVAL) for record in log for key in record):
        said.append(
            "No evaluation is logged. With --eval_data_files FILE or --validation_split_percentage 2 and "
            "--eval_strategy steps --eval_steps N a run has them; --eval_on_start True adds the untouched "
            "model."
        )
    if (report["alpha"] or 0) >= NEAR_ONE and (trade := _nll_for_acc(log)):
        said.append(trade)
    return said


def _nll_for_acc(log: Log) -> str | None:
    nll, acc = series(log, EVAL + NLL.name), series(log, EVAL + ACC.name)
    if min(len(nll), len(acc)) < 2 or not (nll.last > nll.first and acc.last > acc.first):
        return None
    return (
        f"On held-out data nll rose from {format_number(nll.first)} to {format_number(nll.last)} while acc "
        f"rose from {format_number(acc.first)} to {format_number(acc.last)}. With alpha near 1 this is "
        "expected and not a fault: DFT stops training the tokens that the model considers very unlikely."
    )


@dataclass(frozen=True)
class Span:
    """A metric over a run. `best` is the best value and its step; None where there is no better."""

    metric: Metric
    shown: Series
    best: tuple[float, int] | None


def first_last_best(log: Log, prefix: str) -> list[Span]:
    """The metrics that training ("") or evaluation ("eval_") logged."""
    spans = []
    for metric in QUALITY:
        if len(found := series(log, prefix + metric.name)):
            spans.append(Span(metric, found, found.best(metric)))
    return spans


def histogram_words(before: Histogram | None, after: Histogram) -> str:
    """How to read the histogram, and what its "before" is."""
    read = (
        "How to read it: DFT polarizes, so tokens gather near p = 1 and some are given up near p = 0, while "
        "SFT lifts them all, the hopeless ones most (Figure 2 of the paper). The scale is logarithmic."
    )
    if before is None:
        return f"{read} There is one evaluation with a histogram so far, at step {after.step:,}."
    if before.step:
        return (
            f"{read} Here “before” is step {before.step:,}, not the untouched model: --eval_on_start True "
            "evaluates that, too."
        )
    return read


def distribution(shown: Sequence[Histogram]) -> list[dict[str, Any]]:
    """Of each histogram, its step, its tokens and the share of them in each of `RANGES`, as text."""
    return [
        {
            "step": one.step,
            "tokens": int(one.counts.sum()),
            "shares": [f"{100 * one.between(low, high):.1f}\u00a0%" for low, high in RANGES],
        }
        for one in shown
    ]


def files_table(log: Log) -> list[dict[str, Any]]:
    """Of each data file that evaluations tell apart, the first and last value of its metrics."""
    return [
        {
            "file": name,
            **{metric: series(log, f"{EVAL}{name}/{metric}") for metric in PER_FILE},
        }
        for name in file_names(log)
    ]


def data_rows(data: Mapping[str, Any], folder: Path) -> list[Row]:
    """`data_summary` in two columns; nothing where the data is not known."""
    lines = data_summary(dict(data), str(folder)) if data else []
    return [(line[:12].strip(), line[12:]) for line in lines]


def throughput(log: Log) -> list[Row]:
    """Speed, memory and time."""
    rows = []
    for metric in MACHINE:
        values = series(log, metric.name)
        if not values.finite.any():
            continue
        known = values.values[values.finite]
        if metric.unit == "GiB":
            rows.append(("peak memory", f"{known.max():.2f} GiB"))
        elif metric.unit == "tokens/s":
            rows.append(("tokens per second", f"{format_number(float(np.median(known)))} (median)"))
        else:
            rows.append((metric.name.replace("_", " "), f"{100 * np.median(known):.1f} % (median)"))
    if len(taught := series(log, "supervised_tokens")):
        rows.append(("supervised tokens", f"{taught.values.sum():,.0f} trained on"))
    for key, name in (("train_runtime", "run time"), ("eval_runtime", "last evaluation")):
        seconds = series(log, key).last
        if seconds is not None and math.isfinite(seconds):
            rows.append((name, clock(seconds)))
    left = series(log, "seconds_left").last
    if left and math.isfinite(left) and not len(series(log, "train_runtime")):
        rows.append(("left", clock(left)))
    return rows


def argument_rows(values: Mapping[str, Any]) -> list[Row]:
    return [(name, format_argument(value)) for name, value in values.items()]
