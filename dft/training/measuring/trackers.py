"""Callbacks that send run records and histograms to experiment trackers."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import (
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import CallbackHandler

from dft.metrics import HISTOGRAM
from dft.training.measuring.tracker_callbacks import MLflowRunCallback, mlflow_name

MAX_ITEMS = 50
"""Maximum number of list items that are sent to trackers; the files of the run have all of them."""
MAX_CHARACTERS = 2000
"""Maximum length of texts that are sent to trackers."""
MLFLOW_CHARACTERS, MLFLOW_PARAMS = 500, 100
"""Limits of all mlflow servers: length of the value of a parameter, and parameters in a request."""


class RunRecordCallback(TrainerCallback):
    """Sends the record of the run to trackers, as configuration, text (TensorBoard) or parameters (mlflow).

    Args:
        record: JSON values under names such as `arguments`, `data`, `environment`. Long lists and texts are
            truncated.
        handler: callback handler of the trainer. This callback must come after those of the trackers.
    """

    def __init__(self, record: Mapping[str, Any], handler: CallbackHandler) -> None:
        self.record = truncate_record(record)
        self.handler = handler

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        for tracker in self.handler.callbacks:
            if isinstance(tracker, TensorBoardCallback):
                for name, value in self.record.items():
                    tracker.tb_writer.add_text(f"run/{name}", as_markdown(value), state.global_step)
                tracker.tb_writer.flush()
            elif isinstance(tracker, WandbCallback):
                import wandb  # already imported by its callback

                wandb.config.update(self.record, allow_val_change=True)
            elif isinstance(tracker, SwanLabCallback):
                import swanlab

                swanlab.config.update(flatten_record(self.record))
            elif isinstance(tracker, TrackioCallback):
                import trackio

                trackio.config.update(self.record)
            elif isinstance(tracker, MLflowRunCallback) and not tracker.continues:
                send_mlflow_parameters(self.record)


class HistogramCallback(TrainerCallback):
    """Sends the histogram of p of each evaluation to the trackers that support histograms.

    TensorBoard, wandb and trackio have histograms, SwanLab has bar charts. mlflow and SwanLab's local
    dashboard have neither.

    Args:
        handler: callback handler of the trainer. This callback must come after those of the trackers.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self.handler = handler

    def on_evaluate(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        items = (metrics or {}).items()
        histograms = {name: value for name, value in items if name.endswith(f"_{HISTOGRAM}")}
        for name, counts in rewrite_logs(histograms).items():
            for tracker in self.handler.callbacks:
                if isinstance(tracker, TensorBoardCallback):
                    send_to_tensorboard(tracker, name, counts, state.global_step)
                elif isinstance(tracker, WandbCallback):
                    send_to_wandb(name, counts, state.global_step)
                elif isinstance(tracker, SwanLabCallback):
                    send_to_swanlab(name, counts, state.global_step)
                elif isinstance(tracker, TrackioCallback):
                    send_to_trackio(name, counts, state.global_step)


def bin_edges(counts: list[int]) -> np.ndarray:
    """Return the edges of equal bins of [0, 1], (bins + 1,)."""
    return np.linspace(0, 1, len(counts) + 1)


def send_to_tensorboard(tracker: TensorBoardCallback, name: str, counts: list[int], step: int) -> None:
    """Send a histogram to TensorBoard."""
    edges = bin_edges(counts)
    # The exact sums are unknown; all values are assumed to be in the middle of their bins.
    middles = (edges[1:] + edges[:-1]) / 2
    tracker.tb_writer.add_histogram_raw(
        name,
        min=0.0,
        max=1.0,
        num=sum(counts),
        sum=float(middles @ counts),
        sum_squares=float(middles**2 @ counts),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts,
        global_step=step,
    )
    tracker.tb_writer.flush()


def send_to_wandb(name: str, counts: list[int], step: int) -> None:
    """Send a histogram to wandb."""
    import wandb  # already imported by its callback

    histogram = wandb.Histogram(np_histogram=(counts, bin_edges(counts).tolist()))
    wandb.log({name: histogram, "train/global_step": step})


def send_to_swanlab(name: str, counts: list[int], step: int) -> None:
    """Send a histogram to SwanLab as a bar chart."""
    import swanlab  # already imported by its callback

    if swanlab.get_run().mode == "local":
        return  # the local dashboard draws only lines
    edges = bin_edges(counts)
    bars = [f"{low:.2f} to {high:.2f}" for low, high in zip(edges, edges[1:], strict=False)]
    chart = swanlab.echarts.Bar().add_xaxis(bars).add_yaxis("tokens", counts)
    swanlab.log({name: swanlab.ECharts(chart)}, step=step)


def send_to_trackio(name: str, counts: list[int], step: int) -> None:
    """Send a histogram to trackio."""
    import trackio  # already imported by its callback

    trackio.log({name: trackio.Histogram(np_histogram=(counts, bin_edges(counts)))}, step=step)


def send_mlflow_parameters(record: Mapping[str, Any]) -> None:
    """Send a record to mlflow as parameters, with values truncated to what every server accepts."""
    import mlflow  # already imported by its callback

    items = [
        (mlflow_name(name), str(value)[:MLFLOW_CHARACTERS]) for name, value in flatten_record(record).items()
    ]
    for start in range(0, len(items), MLFLOW_PARAMS):
        mlflow.log_params(dict(items[start : start + MLFLOW_PARAMS]), synchronous=False)


def truncate_record(value: Any) -> Any:
    """Return a value with long lists and texts truncated, and a note about the omitted parts."""
    if isinstance(value, Mapping):
        return {name: truncate_record(item) for name, item in value.items()}
    if isinstance(value, list):
        dropped = len(value) - MAX_ITEMS
        note = [f"... and {dropped:,} more"] if dropped > 0 else []
        return [*map(truncate_record, value[:MAX_ITEMS]), *note]
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        return f"{value[:MAX_CHARACTERS]}... and {len(value) - MAX_CHARACTERS:,} more characters"
    return value


def flatten_record(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with lists of dictionaries as JSON.

    `{"data": {"train": {"tokens": 9}}}` becomes `{"data/train/tokens": 9}`. SwanLab's local dashboard shows
    no dictionaries, and swanlab treats None as an empty one.
    """
    flattened: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flattened |= flatten_record(value, f"{prefix}{name}/")
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            flattened[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
        else:
            flattened[f"{prefix}{name}"] = "none" if value is None else value
    return flattened


def as_markdown(value: Any) -> str:
    """Return a value as a Markdown block of JSON."""
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"
