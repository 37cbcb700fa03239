"""Callbacks of transformers' trackers, extended to continue the same run after a resume."""

import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerState
from transformers.integrations import (
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import CallbackHandler

from dft.console import say
from dft.errors import UserError
from dft.ranks import is_main_process
from dft.training.measuring.tracker_runs import TrackerRuns
from dft.training.measuring.tracker_setup import environment, mlflow_remedy, name_swanlab_project, one_line

MLFLOW_NAME = 250
"""Maximum length of a metric or parameter name in mlflow."""


class SwanLabRunCallback(SwanLabCallback):
    """SwanLab callback of transformers, with a corrected start.

    transformers 5.23 asks for the current run before it starts one, which is an error in swanlab 0.10.
    """

    def __init__(self, runs: TrackerRuns) -> None:
        super().__init__()
        self._runs = runs

    def setup(
        self, args: transformers.TrainingArguments, state: TrainerState, model: Any, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._swanlab.has_run():
            name_swanlab_project()
            # swanlab reads SWANLAB_RESUME and SWANLAB_RUN_ID itself.
            earlier = None if os.environ.get("SWANLAB_RUN_ID") else self._runs.identity("swanlab")
            options = {} if earlier is None else {"id": earlier["id"], "resume": "allow"}
            try:
                self._swanlab.init(experiment_name=args.run_name, **options)
            except (OSError, self._swanlab.exceptions.AuthenticationError) as error:
                raise UserError(
                    f"--report_to swanlab: its run cannot be started ({one_line(error)}); check the network "
                    "and the key (swanlab login), or set SWANLAB_MODE=offline"
                ) from None
            if (run_id := self._swanlab.get_run().id) is not None:
                self._runs.store("swanlab", {"id": run_id})
        super().setup(args, state, model, **kwargs)


class WandbRunCallback(WandbCallback):
    """wandb callback of transformers that continues the run of the checkpoint."""

    def __init__(self, runs: TrackerRuns) -> None:
        super().__init__()
        self._runs = runs

    def setup(
        self, args: transformers.TrainingArguments, state: TrainerState, model: Any, **kwargs: Any
    ) -> None:
        try:
            if state.is_world_process_zero:
                self._continue(args)
            super().setup(args, state, model, **kwargs)
        except self._wandb.Error as error:
            raise UserError(
                f"--report_to wandb: its run cannot be started ({one_line(error)}); check the network and "
                "the key (wandb login), or set WANDB_MODE=offline"
            ) from None
        if state.is_world_process_zero:
            self._runs.store("wandb", {"id": self._wandb.run.id})

    def _continue(self, args: transformers.TrainingArguments) -> None:
        """Start the run of the checkpoint, if there is one and the user chose no other."""
        earlier = None if os.environ.get("WANDB_RUN_ID") else self._runs.identity("wandb")
        if earlier is None:
            return
        # wandb warns that it ignores `resume` offline.
        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "huggingface"),
            name=args.run_name,
            id=earlier["id"],
            resume=None if offline else "allow",
        )


class TensorBoardRunCallback(TensorBoardCallback):
    """TensorBoard callback of transformers that writes into the folder of the run it continues."""

    logging_dir: str | None

    def __init__(self, runs: TrackerRuns) -> None:
        super().__init__()
        self._runs = runs

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        earlier = self._runs.identity("tensorboard")
        if self.logging_dir is None and earlier is not None:
            self.logging_dir = earlier["folder"]
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            assert self.logging_dir is not None
            self._runs.store("tensorboard", {"folder": str(Path(self.logging_dir).absolute())})


class MLflowRunCallback(MLflowCallback):
    """mlflow callback of transformers that continues the run of the checkpoint.

    Metrics have the names that other trackers get, as far as mlflow accepts them.

    Attributes:
        continues: whether the run existed before.
    """

    def __init__(self, runs: TrackerRuns) -> None:
        super().__init__()
        self._runs = runs
        self.continues = False

    def setup(self, args: transformers.TrainingArguments, state: TrainerState, model: Any) -> None:
        if not state.is_world_process_zero:
            super().setup(args, state, model)
            return
        options = {}
        earlier = None if os.environ.get("MLFLOW_RUN_ID") else self._runs.identity("mlflow")
        try:
            if earlier is not None and self._exists(earlier["id"]):
                # mlflow rejects changed values of parameters, so those of the first start stay.
                options = {"MLFLOW_RUN_ID": earlier["id"], "MLFLOW_MAX_LOG_PARAMS": "0"}
            self.continues = bool(options)
            with environment(options):
                super().setup(args, state, model)
        except (self._ml_flow.exceptions.MlflowException, ImportError) as error:  # drivers of databases
            raise UserError(mlflow_remedy(self._ml_flow.get_tracking_uri(), error)) from None
        run = self._ml_flow.active_run()
        if run is not None:
            self._runs.store("mlflow", {"id": run.info.run_id})

    def _exists(self, run_id: str) -> bool:
        try:
            self._ml_flow.MlflowClient().get_run(run_id)
        except self._ml_flow.exceptions.MlflowException as error:
            say(f"warning     mlflow: run {run_id} cannot be continued ({error}); a new one starts")
            return False
        return True

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: Mapping[str, Any],
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        accepted = {mlflow_name(name): value for name, value in rewrite_logs(logs).items()}
        super().on_log(args, state, control, accepted, model, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """End the run. The model is not saved yet, so a server that is gone must not stop the program."""
        try:
            super().on_train_end(*args, **kwargs)
        except self._ml_flow.exceptions.MlflowException as error:
            say(f"warning     mlflow: its run may be incomplete ({one_line(error)})")


class TrackioRunCallback(TrackioCallback):
    """trackio callback of transformers that continues the run of the checkpoint and logs by optimizer step.

    Args:
        runs: identities of the tracker runs.
        keeps_open: whether the run ends with `finish` instead of with training.
    """

    def __init__(self, runs: TrackerRuns, keeps_open: bool) -> None:
        super().__init__()
        self._runs, self._keeps_open = runs, keeps_open
        self._end: Any = None

    def setup(
        self, args: transformers.TrainingArguments, state: TrainerState, model: Any, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._start(args)
            self._space_id = self._trackio.context_vars.current_space_id.get()
            config = model.config.to_dict() | args.to_dict()
            # Names that begin with an underscore are reserved.
            self._trackio.config.update(
                {name: value for name, value in config.items() if not name.startswith("_")}
            )
        self._initialized = True

    def _start(self, args: transformers.TrainingArguments) -> None:
        options = {
            "project": args.project,
            "space_id": args.trackio_space_id,
            "private": args.hub_private_repo,
            "bucket_id": args.trackio_bucket_id,
        }
        earlier = self._runs.identity("trackio")
        run = None
        if earlier is not None:
            run = self._trackio.init(name=earlier["name"], resume="allow", **options)
            if run.id != earlier["id"]:  # trackio finds runs by name alone
                say(
                    f"warning     trackio: the latest run named {earlier['name']!r} of project "
                    f"{args.project!r} is not the one of the checkpoint; a new one starts"
                )
                self._trackio.finish()
                run = None
        if run is None:
            run = self._trackio.init(name=args.run_name, resume="never", **options)
        self._runs.store("trackio", {"id": run.id, "name": run.name})

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: Any,
        model: Any = None,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            # transformers passes no step, so that trackio would count log lines.
            self._trackio.log(rewrite_logs(dict(logs or {})), step=state.global_step)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._end = partial(super().on_train_end, *args, **kwargs)
        if not self._keeps_open:
            self.finish()

    def finish(self) -> None:
        """End the run, if it has not ended."""
        if self._end is not None:
            end, self._end = self._end, None
            end()
        elif self._initialized and self._trackio.context_vars.current_run.get() is not None:
            self._trackio.finish()  # training did not reach its end


def replace_trackers(
    handler: CallbackHandler, args: transformers.TrainingArguments, log_artifacts: bool
) -> None:
    """Replace the callbacks of trackers that can continue a run with those of this module.

    Args:
        handler: callback handler of the trainer.
        args: the training arguments.
        log_artifacts: whether artifacts are logged after training.
    """
    runs = TrackerRuns()
    replacements = {
        SwanLabCallback: lambda: SwanLabRunCallback(runs),
        WandbCallback: lambda: WandbRunCallback(runs),
        TensorBoardCallback: lambda: TensorBoardRunCallback(runs),
        MLflowCallback: lambda: MLflowRunCallback(runs),
        TrackioCallback: lambda: TrackioRunCallback(runs, log_artifacts),
    }
    names = dict(zip(replacements, ("swanlab", "wandb", "tensorboard", "mlflow", "trackio"), strict=True))
    replaced = [tracker for tracker in handler.callbacks if names.get(type(tracker)) in args.report_to]
    if not replaced:
        return
    handler.add_callback(runs)
    for tracker in replaced:
        handler.remove_callback(tracker)
        handler.add_callback(replacements[type(tracker)]())


def finish_trackers(
    report_to: list[str],
    error: str | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    is_complete: bool = True,
) -> None:
    """Finish the runs of the trackers, so that their records are complete.

    At the end of the process, wandb would write color escape sequences into log files.

    Args:
        report_to: names of the trackers.
        error: message of the error that ended training; marks the runs as failed.
        callbacks: callbacks of the trainer.
        is_complete: whether training reached its end.
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
    if "mlflow" in report_to:
        import mlflow

        try:
            if mlflow.active_run() is not None:
                mlflow.end_run("FAILED" if error else "FINISHED" if is_complete else "KILLED")
        except mlflow.exceptions.MlflowException as reason:
            say(f"warning     mlflow: its run may be incomplete ({one_line(reason)})")
    for callback in callbacks:
        if isinstance(callback, TrackioRunCallback):
            callback.finish()


def mlflow_name(name: str) -> str:
    """Return a name that mlflow accepts for a metric or a parameter; accepted names are not changed.

    Other characters than ASCII letters, digits and `_-. :/` become `_`, and so does `/` in a name that is no
    plain relative path. A changed or truncated name ends in a digest of the original, so names stay distinct.
    """
    accepted = re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name)
    if posixpath.normpath(accepted) != accepted or accepted.startswith((".", "/")):
        accepted = accepted.replace("/", "_").replace("..", "__") if accepted.strip(".") else "_"
    if accepted == name and len(name) <= MLFLOW_NAME:
        return name
    digest = sha256(name.encode("utf-8", errors="backslashreplace")).hexdigest()[:8]
    return f"{accepted[: MLFLOW_NAME - 9]}-{digest}"
