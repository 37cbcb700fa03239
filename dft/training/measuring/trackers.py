"""Set up experiment trackers, and send them run records and histograms."""

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import SwanLabCallback, TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import CallbackHandler

from dft.errors import UserError
from dft.metrics import HISTOGRAM
from dft.ranks import is_main_process

MAX_ITEMS = 50
"""Maximum number of list items that are sent to trackers; the files of the run have all of them."""
MAX_CHARACTERS = 2000
"""Maximum length of texts that are sent to trackers."""
MODES = {
    "wandb": ("online", "offline", "disabled", "dryrun", "shared"),
    "swanlab": ("online", "cloud", "offline", "local", "disabled"),
}
SWANLAB_NAME = re.compile(r"[0-9a-zA-Z_+.-]{1,100}")
"""Names that SwanLab accepts for a project."""


class SwanLabRunCallback(SwanLabCallback):
    """transformers' SwanLab callback, started correctly.

    transformers 5.23 asks for the current run before it starts one, which is an error in swanlab 0.10.
    """

    def setup(
        self, args: transformers.TrainingArguments, state: TrainerState, model: Any, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._swanlab.has_run():
            name_swanlab_project()
            # swanlab reads SWANLAB_RESUME and SWANLAB_RUN_ID itself; they take precedence.
            resumes = args.resume_from_checkpoint and not os.environ.get("SWANLAB_RESUME")
            self._swanlab.init(experiment_name=args.run_name, resume="allow" if resumes else None)
        super().setup(args, state, model, **kwargs)


class RunRecordCallback(TrainerCallback):
    """Sends the record of the run to every tracker, as configuration (SwanLab, wandb) or text (TensorBoard).

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


class HistogramCallback(TrainerCallback):
    """Sends the histogram of p of each evaluation to the trackers that can show one.

    TensorBoard and wandb have histograms, SwanLab has bar charts. SwanLab's local dashboard has neither.

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


def bin_edges(counts: list[int]) -> np.ndarray:
    """Return the edges of equal bins of [0, 1], (bins + 1,)."""
    return np.linspace(0, 1, len(counts) + 1)


def send_to_tensorboard(tracker: TensorBoardCallback, name: str, counts: list[int], step: int) -> None:
    """Send a histogram to TensorBoard."""
    edges = bin_edges(counts)
    # Sums are not known; they are computed as if all values were in the middle of their bins.
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
        return  # the local dashboard draws lines only
    edges = bin_edges(counts)
    bars = [f"{low:.2f} to {high:.2f}" for low, high in zip(edges, edges[1:], strict=False)]
    chart = swanlab.echarts.Bar().add_xaxis(bars).add_yaxis("tokens", counts)
    swanlab.log({name: swanlab.ECharts(chart)}, step=step)


def truncate_record(value: Any) -> Any:
    """Return a value with long lists and texts truncated, and a note on what was dropped."""
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
    no dictionaries, and swanlab takes None for an empty one.
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


def prepare_trackers(report_to: list[str], logging_dir: str | None = None) -> list[str]:
    """Set the environment variables that trackers read when they start.

    Args:
        report_to: names of the trackers.
        logging_dir: folder they write to; None leaves it to each of them.

    Returns:
        One line for each tracker that was set offline.

    Raises:
        UserError: a folder, a mode or a project name cannot be used, or a package is not installed.
    """
    if not report_to:
        return []
    set_log_directory(logging_dir)
    # wandb would print tables of all metrics at the end, which the log of the run has already.
    os.environ.setdefault("WANDB_QUIET", "true")
    check_modes(report_to)
    notes = set_offline_without_login(report_to)
    if "swanlab" in report_to and is_main_process():
        check_swanlab_dashboard()
    return notes


def check_modes(report_to: list[str]) -> None:
    """Raise `UserError` for a mode that a tracker does not have."""
    for tracker, modes in MODES.items():
        variable = f"{tracker.upper()}_MODE"
        mode = os.environ.get(variable)
        if tracker in report_to and mode and mode not in modes:
            raise UserError(f"{variable} {mode!r}: not a mode of {tracker}; use {', '.join(modes)}")


def finish_trackers(report_to: list[str], error: str | None = None) -> None:
    """End the runs of wandb and SwanLab, so that their records are complete.

    At the end of the process, wandb would write color escape sequences into log files.

    Args:
        report_to: names of the trackers.
        error: message of the error that ended training; marks the runs as failed.
    """
    if not is_main_process():
        return
    if "wandb" in report_to:
        import wandb  # already imported by its callback

        wandb.finish(exit_code=1 if error else 0)
    if "swanlab" in report_to:
        import swanlab

        if swanlab.has_run():
            swanlab.finish(state="crashed" if error else "success", error=error)


def set_offline_without_login(report_to: list[str]) -> list[str]:
    """Set trackers without a login and without a mode offline; they would ask for a key and wait.

    Args:
        report_to: names of the trackers.

    Returns:
        One line for each tracker that was set offline.

    Raises:
        UserError: SwanLab does not accept the project name.
    """
    if "swanlab" in report_to:
        name_swanlab_project()
    notes = []
    for tracker, variable, has_login in (
        ("swanlab", "SWANLAB_MODE", swanlab_has_login),
        ("wandb", "WANDB_MODE", wandb_has_login),
    ):
        if tracker in report_to and not os.environ.get(variable) and not has_login():
            os.environ[variable] = "offline"
            notes.append(
                f"{tracker}: no login and no {variable}, so it runs offline; upload later with `{tracker} "
                f"sync`, or log in with `{tracker} login`"
            )
    return notes


def set_log_directory(folder: str | None) -> None:
    """Set the folder that trackers write to; they read it from the environment at the first metric."""
    if folder is None:
        return
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)  # wandb looks for a git repository around it
    except OSError as error:
        raise UserError(
            f"--logging_dir {folder}: cannot be created ({error.strerror}); name another folder"
        ) from None
    for name in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR"):
        os.environ[name] = str(path)


def name_swanlab_project() -> None:
    """Set the project name where swanlab 0.10 reads it.

    transformers documents the variable SWANLAB_PROJECT, which swanlab 0.10 requires to be a JSON object. The
    default project name is that of the current folder, and swanlab fails if a project cannot be named so.

    Raises:
        UserError: SwanLab does not accept the project name.
    """
    import swanlab  # slow to import, and needed only by runs that report to it

    project = os.environ.pop("SWANLAB_PROJECT", None)
    if project:
        if not SWANLAB_NAME.fullmatch(project):
            raise UserError(
                f"SWANLAB_PROJECT {project!r}: a SwanLab project name has at most 100 letters, digits, "
                "'-', '_', '+' and '.'"
            )
        os.environ["SWANLAB_PROJECT_NAME"] = project
    elif not SWANLAB_NAME.fullmatch(Path.cwd().name) and swanlab.Settings().project.name is None:
        name = re.sub(r"[^\w+.-]+", "-", Path.cwd().name, flags=re.ASCII)[:100]
        os.environ["SWANLAB_PROJECT_NAME"] = name or "dft"


def check_swanlab_dashboard() -> None:
    """Raise `UserError` if SwanLab's local mode is chosen and its dashboard is not installed."""
    import swanlab  # slow to import

    if swanlab.Settings().mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise UserError(
            "--report_to swanlab in local mode: its dashboard is not installed; pip install "
            "'swanlab[dashboard]', or set SWANLAB_MODE=offline"
        )


def swanlab_has_login() -> bool:
    """Return whether SwanLab has a key, or a mode in which it needs none."""
    import swanlab  # slow to import

    settings = swanlab.Settings()
    return settings.api_key is not None or settings.mode != "online"


def wandb_has_login() -> bool:
    """Return whether wandb has a key or a token."""
    # Slow to import. wandb.setup() would know more, but fixes the mode for the whole process.
    from wandb.sdk.lib import wbauth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(has_key) or wbauth.read_netrc_auth(host=host) is not None
