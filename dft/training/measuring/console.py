"""What a person sees of a run: one aligned line per logging step, from rank 0."""

import logging
import warnings
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from dft.console import clock, format_short
from dft.errors import rank_tag
from dft.metrics import METRICS

LIBRARIES = ("transformers", "datasets", "accelerate")
"""Whose log records begin with the rank."""
ALIGNED = [name for name in METRICS if name != "kl"]
"""Metrics that have their place in every line; kl is of one objective alone."""
TRAIN_COLUMNS = (
    *METRICS,
    "aux_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "padding_share",
    "mfu",
)
EVAL_COLUMNS = (*METRICS, "supervised_tokens")


def tag_warnings() -> None:
    """Where there are several ranks, a warning or record of a log says from which it is."""
    tag = rank_tag()
    if not tag:
        return
    plain = warnings.formatwarning

    def tagged(*args: Any, **kwargs: Any) -> str:
        return tag + plain(*args, **kwargs)

    warnings.formatwarning = tagged
    form = logging.Formatter(tag + "%(levelname)s %(name)s: %(message)s")
    logging.basicConfig()
    for logger in (logging.getLogger(), *map(logging.getLogger, LIBRARIES)):
        for handler in logger.handlers:
            handler.setFormatter(form)


class ConsoleCallback(ProgressCallback):
    """A line per log record, above the progress bar if there is one."""

    def __init__(self, show_bar: bool) -> None:
        super().__init__()
        self.show_bar = show_bar

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
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if line is None or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def log_line(logs: dict[str, float], step: int, max_steps: int) -> str | None:
    """One log record as a line, or None for one that holds nothing to read."""
    width = len(str(max_steps))
    if "learning_rate" in logs:
        kind, columns = "train", columns_of(logs, TRAIN_COLUMNS)
    elif prefix := evaluation_prefix(logs):
        kind = prefix.rstrip("_").replace("_", " ", 1)
        columns = columns_of({name.removeprefix(prefix): logs[name] for name in logs}, EVAL_COLUMNS)
    else:
        return None
    cells = [f"{name} {format_short(value):<9}" for name, value in columns.items()]
    if "peak_memory_gib" in logs:
        cells.append(f"memory {logs['peak_memory_gib']:.2f} GiB  left {clock(logs['seconds_left'])}")
    place = f"{kind:<5} step {step:>{width}}/{max_steps}  epoch {logs.get('epoch', 0):<6.2f}"
    return f"{place}  {'  '.join(cells)}".rstrip()


def evaluation_prefix(logs: dict[str, float]) -> str | None:
    """`eval_`, or `eval_<name>_` of one of several datasets; None for what is no evaluation."""
    names = [name for name in logs if name.startswith("eval_") and name.endswith("_supervised_tokens")]
    return names[0].removesuffix("supervised_tokens") if names else None


def columns_of(logs: dict[str, float], names: tuple[str, ...]) -> dict[str, float | None]:
    """What is in the log, and of the metrics also what is not, so that lines stand under one another."""
    return {name: logs.get(name) for name in names if name in logs or name in ALIGNED}
