"""Experiment trackers must never stop a background run with a question."""

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerState
from transformers.integrations import SwanLabCallback


class SwanLabRunCallback(SwanLabCallback):
    """transformers' SwanLab callback, with the run begun first.

    transformers 5.23 asks for the current run before it begins one, which swanlab 0.10 answers with an error.
    """

    def setup(
        self, args: transformers.TrainingArguments, state: TrainerState, model: Any, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._swanlab.has_run():
            self._swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name=args.run_name)
        super().setup(args, state, model, **kwargs)


def go_offline_without_login(report_to: list[str]) -> list[str]:
    """Sets trackers offline that have neither a login nor a mode; they would ask for a key and wait.

    Returns:
        One line for each tracker that was set offline.
    """
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


def write_under(folder: str | None) -> None:
    """Where trackers put their files; they read it from the environment when the first metric arrives."""
    if folder is None:
        return
    for name in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR"):
        os.environ[name] = str(Path(folder).expanduser().absolute())


def swanlab_has_login() -> bool:
    import swanlab  # slow to import, and needed by runs that report to it alone

    settings = swanlab.Settings()
    return settings.api_key is not None or settings.mode != "online"


def wandb_has_login() -> bool:
    # As above. wandb.setup() would know more, and would fix the mode for the whole process.
    from wandb.sdk.lib import wbauth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(has_key) or wbauth.read_netrc_auth(host=host) is not None
