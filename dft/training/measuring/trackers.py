"""Experiment trackers: what transformers' callbacks leave out, and no question that stops a nohup run."""

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

LONGEST_LIST = 50
"""Items of a list in the record of a run; the files of the run itself have all."""
LONGEST_TEXT = 2000
MODES = {
    "wandb": ("online", "offline", "disabled", "dryrun", "shared"),
    "swanlab": ("online", "cloud", "offline", "local", "disabled"),
}
SWANLAB_NAME = re.compile(r"[0-9a-zA-Z_+.-]{1,100}")
"""Of a project."""


class SwanLabRunCallback(SwanLabCallback):
    """transformers' SwanLab callback, with the run begun first.

    transformers 5.23 asks for the current run before it begins one, which swanlab 0.10 answers with an error.
    """

    def setup(
        self, args: transformers.TrainingArguments, state: TrainerState, model: Any, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._swanlab.has_run():
            name_swanlab_project()
            # Not over SWANLAB_RESUME, which swanlab reads itself, as it does SWANLAB_RUN_ID.
            go_on = args.resume_from_checkpoint and not os.environ.get("SWANLAB_RESUME")
            self._swanlab.init(experiment_name=args.run_name, resume="allow" if go_on else None)
        super().setup(args, state, model, **kwargs)


class RunRecordCallback(TrainerCallback):
    """Writes into every tracker what the run is: as configuration (SwanLab, wandb) or text (TensorBoard).

    Args:
        record: JSON values under names such as `arguments`, `data`, `environment`. Long lists and texts are
            cut, which trackers are not made for.
        handler: of the trainer's callbacks, among which those of the trackers are; it must call this one
            after them.
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
                import wandb  # its callback did so already

                wandb.config.update(self.record, allow_val_change=True)
            elif isinstance(tracker, SwanLabCallback):
                import swanlab

                swanlab.config.update(flatten_record(self.record))


class HistogramCallback(TrainerCallback):
    """Sends the histogram of p of each evaluation to the trackers that can show one.

    TensorBoard and wandb have histograms, SwanLab bar charts. SwanLab's local dashboard has neither.

    Args:
        handler: of the trainer's callbacks, among which those of the trackers are; it must call this one
            after them.
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
        found = {name: value for name, value in (metrics or {}).items() if name.endswith(f"_{HISTOGRAM}")}
        for name, counts in rewrite_logs(found).items():
            for tracker in self.handler.callbacks:
                if isinstance(tracker, TensorBoardCallback):
                    to_tensorboard(tracker, name, counts, state.global_step)
                elif isinstance(tracker, WandbCallback):
                    to_wandb(name, counts, state.global_step)
                elif isinstance(tracker, SwanLabCallback):
                    to_swanlab(name, counts, state.global_step)


def edges_of(counts: list[int]) -> np.ndarray:
    """(bins + 1,) equal parts of [0, 1]."""
    return np.linspace(0, 1, len(counts) + 1)


def to_tensorboard(tracker: TensorBoardCallback, name: str, counts: list[int], step: int) -> None:
    edges = edges_of(counts)
    # Only the counts are known: the sums are those of tokens in the middle of their bins.
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


def to_wandb(name: str, counts: list[int], step: int) -> None:
    import wandb  # its callback did so already

    histogram = wandb.Histogram(np_histogram=(counts, edges_of(counts).tolist()))
    wandb.log({name: histogram, "train/global_step": step})


def to_swanlab(name: str, counts: list[int], step: int) -> None:
    import swanlab  # its callback did so already

    if swanlab.get_run().mode == "local":
        return  # its dashboard draws lines only
    edges = edges_of(counts)
    bars = [f"{low:.2f} to {high:.2f}" for low, high in zip(edges, edges[1:], strict=False)]
    chart = swanlab.echarts.Bar().add_xaxis(bars).add_yaxis("tokens", counts)
    swanlab.log({name: swanlab.ECharts(chart)}, step=step)


def truncate_record(value: Any) -> Any:
    """The value with long lists and texts in it cut, and a word on what is left out."""
    if isinstance(value, Mapping):
        return {name: truncate_record(item) for name, item in value.items()}
    if isinstance(value, list):
        rest = len(value) - LONGEST_LIST
        more = [f"... and {rest:,} more"] if rest > 0 else []
        return [*map(truncate_record, value[:LONGEST_LIST]), *more]
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:LONGEST_TEXT]}... and {len(value) - LONGEST_TEXT:,} more characters"
    return value


def flatten_record(record: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"data": {"train": {"tokens": 9}}}` as `{"data/train/tokens": 9}`; lists of dictionaries as JSON.

    SwanLab's local dashboard shows no dictionaries, and None is an empty one to swanlab.
    """
    found = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= flatten_record(value, f"{above}{name}/")
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            found[f"{above}{name}"] = json.dumps(value, ensure_ascii=False)
        else:
            found[f"{above}{name}"] = "none" if value is None else value
    return found


def as_markdown(value: Any) -> str:
    """JSON that TensorBoard shows as it stands."""
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


def prepare_trackers(report_to: list[str], logging_dir: str | None = None) -> list[str]:
    """Sets the variables that trackers read, before any of them begins.

    Args:
        report_to: the trackers.
        logging_dir: where they write; None leaves it to each of them.

    Returns:
        One line for each tracker that was set offline.

    Raises:
        UserError: a folder or a name that cannot be used, or a package that is not installed.
    """
    if not report_to:
        return []
    set_log_directory(logging_dir)
    # wandb ends with tables of all metrics, which the log of the run has already.
    os.environ.setdefault("WANDB_QUIET", "true")
    check_modes(report_to)
    notes = set_offline_without_login(report_to)
    if "swanlab" in report_to and is_main_process():
        check_swanlab_dashboard()
    return notes


def check_modes(report_to: list[str]) -> None:
    """Raises `UserError` for a mode that a tracker does not know."""
    for tracker, modes in MODES.items():
        variable = f"{tracker.upper()}_MODE"
        mode = os.environ.get(variable)
        if tracker in report_to and mode and mode not in modes:
            raise UserError(f"{variable} {mode!r}: {tracker} knows {', '.join(modes)}")


def finish_trackers(report_to: list[str], error: str | None = None) -> None:
    """Ends the runs of wandb and SwanLab, whose records are complete then; as failed ones after an error.

    Left to the end of the process, wandb writes escape sequences of colors into log files.
    """
    if not is_main_process():
        return
    if "wandb" in report_to:
        import wandb  # its callback did so already

        wandb.finish(exit_code=1 if error else 0)
    if "swanlab" in report_to:
        import swanlab

        if swanlab.has_run():
            swanlab.finish(state="crashed" if error else "success", error=error)


def set_offline_without_login(report_to: list[str]) -> list[str]:
    """Sets trackers offline that have neither a login nor a mode; they would ask for a key and wait.

    Returns:
        One line for each tracker that was set offline.

    Raises:
        UserError: a name for the project that SwanLab refuses.
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
    """Where trackers put their files; they read it from the environment when the first metric arrives."""
    if folder is None:
        return
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)  # wandb looks for a git repository around it
    except OSError as error:
        raise UserError(f"--logging_dir {folder}: cannot be made ({error.strerror})") from None
    for name in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR"):
        os.environ[name] = str(path)


def name_swanlab_project() -> None:
    """Puts the name of the project where swanlab 0.10 reads it.

    transformers' variable for it, SWANLAB_PROJECT, must be a JSON object for swanlab 0.10, which stops at
    anything else. It also stops in a folder whose name, its default, is not one that a project may have.

    Raises:
        UserError: a name that SwanLab refuses.
    """
    import swanlab  # slow to import, and needed by runs that report to it alone

    given = os.environ.pop("SWANLAB_PROJECT", None)
    if given:
        if not SWANLAB_NAME.fullmatch(given):
            raise UserError(
                f"SWANLAB_PROJECT {given!r}: a project of SwanLab is named by at most 100 letters, digits, "
                "'-', '_', '+' and '.'"
            )
        os.environ["SWANLAB_PROJECT_NAME"] = given
    elif not SWANLAB_NAME.fullmatch(Path.cwd().name) and swanlab.Settings().project.name is None:
        name = re.sub(r"[^\w+.-]+", "-", Path.cwd().name, flags=re.ASCII)[:100]
        os.environ["SWANLAB_PROJECT_NAME"] = name or "dft"


def check_swanlab_dashboard() -> None:
    import swanlab  # as above

    if swanlab.Settings().mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise UserError(
            "--report_to swanlab in local mode: its dashboard is not installed; pip install "
            "'swanlab[dashboard]', or set SWANLAB_MODE=offline"
        )


def swanlab_has_login() -> bool:
    import swanlab  # as above

    settings = swanlab.Settings()
    return settings.api_key is not None or settings.mode != "online"


def wandb_has_login() -> bool:
    # As above. wandb.setup() would know more, and would fix the mode for the whole process.
    from wandb.sdk.lib import wbauth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(has_key) or wbauth.read_netrc_auth(host=host) is not None
