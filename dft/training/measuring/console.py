"""Callback that prints the metrics of training and evaluation: one row per log record, under a heading.

                   epoch    loss     nll       p     acc  grad_norm       lr  tok/s      left
train step 20/600  0.100  0.2215  2.7412  0.1530  0.4402     1.8321  2.00e-5  31.2k   0:03:12
eval  step 20/600  0.100  0.2198  2.6120  0.1611  0.4523
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from dft.console import short_clock, short_number, wrap
from dft.errors import rank_tag
from dft.metrics import CONSOLE, Metric, Source, metrics_named

LIBRARIES = ("transformers", "datasets", "accelerate")
"""Libraries whose log records are prefixed with the rank."""
LINE_WIDTH = 100
"""Maximum width of a row with the default columns, in characters."""
HEADING_EVERY = 20
"""Number of rows after which the heading is repeated."""
EPOCH_WIDTH = 5
ZERO_GRADIENT = (
    "the gradient is 0: the objective gives no target of this step a weight, so training changes nothing; "
    "use one that trains unlikely tokens as well, such as --dft_alpha 0.5"
)
"""Warning about a step that trains nothing, for example with `threshold` and a model that knows nothing."""


def tag_warnings() -> None:
    """Prefix warnings and log records with the rank if there are several ranks."""
    tag = rank_tag()
    if not tag:
        return
    untagged = warnings.formatwarning

    def tagged(*args: Any, **kwargs: Any) -> str:
        return tag + untagged(*args, **kwargs)

    warnings.formatwarning = tagged
    formatter = logging.Formatter(tag + "%(levelname)s %(name)s: %(message)s")
    logging.basicConfig()
    for logger in (logging.getLogger(), *map(logging.getLogger, LIBRARIES)):
        for handler in logger.handlers:
            handler.setFormatter(formatter)


class ConsoleCallback(ProgressCallback):
    """Prints a row for each log record, above the progress bar if there is one.

    Args:
        show_bar: whether to show the progress bar.
        metrics: names of the metrics to print, of `dft.metrics`.
    """

    def __init__(self, show_bar: bool, metrics: Sequence[str] = CONSOLE) -> None:
        super().__init__()
        self.show_bar = show_bar
        self.columns = metrics_named(metrics)
        self.rows_printed = 0
        self.has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.show_bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.show_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.show_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.show_bar:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        row = log_row(logs or {}, self.columns, state.global_step, state.max_steps)
        if row is None or not state.is_world_process_zero:
            return
        if self.rows_printed % HEADING_EVERY == 0:
            self._print(heading(self.columns, state.max_steps))
        self.rows_printed += 1
        self._print(row)
        if logs and logs.get("grad_norm") == 0 and not self.has_warned:
            self.has_warned = True
            self._print("\n".join(wrap("warning", ZERO_GRADIENT)))

    def _print(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def heading(columns: Sequence[Metric], max_steps: int) -> str:
    """Return the headings of the columns of `log_row`."""
    start = " " * len(_start("train", 0, max_steps))
    return "  ".join([start, f"{'epoch':>{EPOCH_WIDTH}}", *(f"{c.heading:>{_width(c)}}" for c in columns)])


def log_row(logs: Mapping[str, float], columns: Sequence[Metric], step: int, max_steps: int) -> str | None:
    """Format a log record as a row, or return None if it comes from neither training nor evaluation.

    A missing metric is shown as "-"; a metric that evaluations never log is left blank in their rows.
    """
    if "learning_rate" in logs:
        kind, prefix, hidden = "train", "", Source.EVALUATION
    elif prefix := evaluation_prefix(logs):
        kind, hidden = "eval", Source.TRAINING
    else:
        return None
    epoch = short_number(float(logs.get("epoch", 0)), EPOCH_WIDTH)
    cells = [
        "" if metric.source == hidden else format_value(metric, logs.get(prefix + metric.name))
        for metric in columns
    ]
    cells = [f"{cell:>{_width(metric)}}" for metric, cell in zip(columns, cells, strict=True)]
    row = "  ".join([_start(kind, step, max_steps), f"{epoch:>{EPOCH_WIDTH}}", *cells]).rstrip()
    dataset = prefix.removeprefix("eval_").rstrip("_")
    return f"{row}  {_cut(dataset, LINE_WIDTH - len(row) - 2)}" if dataset else row


def format_value(metric: Metric, value: float | None) -> str:
    """Format a value of a metric in the width of its column; "-" for None."""
    if value is None:
        return "-"
    return short_clock(value, metric.width) if metric.unit == "s" else short_number(value, metric.width)


def evaluation_prefix(logs: Mapping[str, float]) -> str:
    """Return `eval_`, `eval_<name>_` for one of several datasets, or "" if it is not an evaluation."""
    names = [name for name in logs if name.startswith("eval_") and name.endswith("_supervised_tokens")]
    return names[0].removesuffix("supervised_tokens") if names else ""


def _start(kind: str, step: int, max_steps: int) -> str:
    word = "" if max_steps >= 1_000_000 else "step "  # to stay within LINE_WIDTH
    return f"{kind:<5} {word}{step:>{len(str(max_steps))}}/{max_steps}"


def _width(metric: Metric) -> int:
    return max(metric.width, len(metric.heading))


def _cut(name: str, width: int) -> str:
    """Return a name, shortened at its start to fit a width of at least 8 characters."""
    width = max(width, 8)
    return name if len(name) <= width else "..." + name[3 - width :]
