"""Which trackers transformers knows, what installs each, and which of them store artifacts."""

import os

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, is_flytekit_available

from dft.errors import UserError

INSTALL = {
    "azure_ml": "azureml-sdk",
    "comet_ml": "'comet_ml>=3.43.2'",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
    # The package mlflow requires an older pyarrow than this program; the skinny one has the whole client.
    "mlflow": "mlflow-skinny sqlalchemy alembic",
}
"""What to pass to `pip install`, where that is not the name of the tracker."""
WITH_ARTIFACTS = ("wandb", "mlflow", "trackio")
"""Trackers that `--log_artifacts` supports."""


def check_trackers(report_to: list[str]) -> None:
    """Raise `UserError` for a tracker that is unknown, not installed or not configured."""
    for tracker in report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to {tracker}: unknown tracker; choose from "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if tracker in get_available_reporting_integrations():
            continue
        if tracker == "flyte" and is_flytekit_available():  # transformers does not list it
            continue
        raise UserError(f"--report_to {tracker}: {_remedy(tracker)}")


def _remedy(tracker: str) -> str:
    """Return why a tracker cannot be used, and what to do."""
    if tracker == "kubeflow":
        return "only works inside a Kubeflow TrainJob, which sets KUBEFLOW_TRAINER_SERVER_URL; remove it"
    if tracker == "azure_ml" and "mlflow" in get_available_reporting_integrations():
        return "transformers reports to Azure ML by mlflow where that is installed; use --report_to mlflow"
    if tracker == "mlflow" and os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE":
        return "DISABLE_MLFLOW_INTEGRATION=TRUE switches it off; unset that variable, or remove mlflow"
    return f"its package is not installed; pip install {INSTALL.get(tracker, tracker)}"


def artifact_notes(report_to: list[str], log_artifacts: bool) -> list[str]:
    """Return a line for each tracker that does not get what `--log_artifacts True` asks for."""
    if not log_artifacts:
        return []
    if not report_to:
        return ["--log_artifacts True has no effect without --report_to"]
    return [
        f"--log_artifacts True: {tracker} gets no artifacts; {', '.join(WITH_ARTIFACTS)} do"
        for tracker in report_to
        if tracker not in WITH_ARTIFACTS
    ]
