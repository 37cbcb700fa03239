"""Set up experiment trackers before they start."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from dft.errors import UserError
from dft.ranks import is_main_process

MODES = {
    "wandb": ("online", "offline", "disabled", "dryrun", "shared"),
    "swanlab": ("online", "cloud", "offline", "local", "disabled"),
}
SWANLAB_NAME = re.compile(r"[0-9a-zA-Z_+.-]{1,100}")
"""Names that SwanLab accepts for a project."""


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
    # wandb would print tables of all metrics at the end, duplicating the run's log.
    os.environ.setdefault("WANDB_QUIET", "true")
    check_modes(report_to)
    notes = set_offline_without_login(report_to)
    if "swanlab" in report_to and is_main_process():
        check_swanlab_dashboard()
    if "mlflow" in report_to:
        check_mlflow_store()
    return notes


def check_modes(report_to: list[str]) -> None:
    """Raise `UserError` for a mode that a tracker does not have."""
    for tracker, modes in MODES.items():
        variable = f"{tracker.upper()}_MODE"
        mode = os.environ.get(variable)
        if tracker in report_to and mode and mode not in modes:
            raise UserError(f"{variable} {mode!r}: not a mode of {tracker}; use {', '.join(modes)}")


def set_offline_without_login(report_to: list[str]) -> list[str]:
    """Set trackers without a login and without a mode to offline mode; they would wait for a key.

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
    for name in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR", "TRACKIO_DIR"):
        os.environ[name] = str(path)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{path}/mlflow.db")  # it may name a server


def name_swanlab_project() -> None:
    """Set the project name where swanlab 0.10 reads it.

    transformers documents the variable SWANLAB_PROJECT, which swanlab 0.10 requires to be a JSON object. The
    default project name is that of the current folder, and swanlab fails if a project cannot be named so.

    Raises:
        UserError: SwanLab does not accept the project name.
    """
    import swanlab  # slow to import; needed only by runs that report to it

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


def check_mlflow_store() -> None:
    """Raise `UserError` if mlflow writes to a database and the packages for that are not installed."""
    import mlflow  # slow to import

    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("sqlite:", "mysql", "postgresql", "mssql")):
        return
    missing = [name for name in ("sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--report_to mlflow: its store {uri.split('@')[-1]} needs {' and '.join(missing)}; pip install "
            f"{' '.join(missing)}, or set MLFLOW_TRACKING_URI to a server"
        )


def check_mlflow_server(report_to: list[str]) -> None:
    """Raise `UserError` if mlflow reports to a server that does not answer. Only rank 0 reports.

    mlflow itself tries for minutes, once training begins.
    """
    if "mlflow" not in report_to or not is_main_process():
        return
    import mlflow  # slow to import

    uri = mlflow.get_tracking_uri()
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    try:
        with environment(limits):
            mlflow.MlflowClient().search_experiments(max_results=1)
    except mlflow.exceptions.MlflowException as error:
        raise UserError(mlflow_remedy(uri, error)) from None


def mlflow_remedy(uri: str, error: Exception) -> str:
    """Return why mlflow cannot report to its store, and what to do, without the password of the store."""
    text = f"--report_to mlflow: its store {uri} cannot be used ({one_line(error)})"
    address = urlsplit(uri)
    if address.password:
        text = text.replace(f":{address.password}@", ":***@")
    return f"{text}; start or correct it (MLFLOW_TRACKING_URI), or remove mlflow from --report_to"


def one_line(error: Exception) -> str:
    """Return the message of an error as one line."""
    return " ".join(str(error).split())


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)  # mlflow removes the run id itself
            else:
                os.environ[name] = value


def swanlab_has_login() -> bool:
    """Return whether SwanLab has a key, or a mode that does not need one."""
    import swanlab  # slow to import

    settings = swanlab.Settings()
    return settings.api_key is not None or settings.mode != "online"


def wandb_has_login() -> bool:
    """Return whether wandb has a key or a token."""
    # Slow to import. wandb.setup() would be more accurate, but it fixes the mode for the whole process.
    from wandb.sdk.lib import wbauth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(has_key) or wbauth.read_netrc_auth(host=host) is not None
