"""Reading the report of a saved run, from `report.json` or, if there is none, from `trainer_state.json`."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.arguments.config_file import RUN_ARGS
from dft.errors import UserError
from dft.loss.objectives import OBJECTIVES, Dft, Objective
from dft.report.log_file import LOG, is_record, read_log

RUN_REPORT = "report.json"
RUNNING = "running"
"""Status in the `report.json` of a run that has not ended. A run that is killed leaves it there."""
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
EMPTY_REPORT: dict[str, Any] = {
    "name": "",
    "status": "unknown",
    "updated": None,
    "method": None,
    "alpha": None,
    "weight": "",
    "model": {},
    "arguments": {},
    "given": {},
    "environment": {},
    "data": {},
    "steps": {},
    "log": [],
    "tokens": [],
    "base_scores": None,
}
"""Fields of a report, with their values if not recorded."""
KINDS: dict[type, str] = {str: "a text", dict: "an object", list: "a list"}
"""Names of the types of fields, for messages. Fields that may be null have any type."""


def load_report(run: Path) -> dict[str, Any]:
    """Load the report of a run.

    A run without `report.json`, because it is older or was interrupted, is read from `trainer_state.json` in
    its output directory or in its newest checkpoint, or from `log.jsonl` if that has more. The latter also
    continues the report of a run that has not ended.

    Args:
        run: an output directory, or the `report.json` in it.

    Raises:
        UserError: the run does not exist, or a file of it cannot be read.
    """
    if not run.exists():
        raise UserError(f"{run}: no such file or folder; pass the --output_dir of a run")
    if run.is_file():
        return read_report(run)
    if (run / RUN_REPORT).is_file():
        report = read_report(run / RUN_REPORT)
        return continued(report, read_log(run / LOG)) if report["status"] == RUNNING else report
    state = find_trainer_state(run)
    log = read_log(run / LOG)
    if state is None and log:
        return report_from_log(run, log, f"unknown: read from {run / LOG}")
    if state is None:
        raise UserError(
            f"{run}: contains no {RUN_REPORT} and no {TRAINER_STATE_NAME}, nor a checkpoint with the latter; "
            "pass the --output_dir of a run that has logged metrics"
        )
    return continued(report_from_state(run, state), log)


def continued(report: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a report with the log of `log.jsonl` if that has more records."""
    if len(log) <= len(report["log"]):
        return report
    steps = {**report["steps"], "done": max(last_step(log), report["steps"].get("done", 0))}
    return {**report, "log": log, "steps": steps if "total" in steps else {}}


def last_step(log: list[dict[str, Any]]) -> int:
    """Return the optimizer step of the last record that has one; 0 if there is none."""
    return next((record["step"] for record in reversed(log) if isinstance(record.get("step"), int)), 0)


def folder_of(run: Path) -> Path:
    """Return the output directory of a run that is given by its directory or by its `report.json`."""
    return run.parent if run.is_file() else run


def read_report(file: Path) -> dict[str, Any]:
    """Read a `report.json`, and fill in the fields that it lacks.

    Raises:
        UserError: the file cannot be read, or is not a report.
    """
    report = _read_json_object(file, f"remove it, and {TRAINER_STATE_NAME} is read instead")
    _check_log(report, "log", file)
    for name, default in EMPTY_REPORT.items():
        if default is not None and not isinstance(report.get(name, default), type(default)):
            raise UserError(f"{file}: {name!r} is not {KINDS[type(default)]}; pass the --output_dir of a run")
    return {**EMPTY_REPORT, "name": file.absolute().parent.name, **report}


def find_trainer_state(run: Path) -> Path | None:
    """Return the `trainer_state.json` of a run or of its newest checkpoint; None if there is none."""
    checkpoints = [
        (int(match[1]), folder) for folder in run.iterdir() if (match := CHECKPOINT.fullmatch(folder.name))
    ]
    folders = [run, *(folder for _, folder in sorted(checkpoints, reverse=True))]
    files = (folder / TRAINER_STATE_NAME for folder in folders)
    return next((file for file in files if file.is_file()), None)


def report_from_state(run: Path, file: Path) -> dict[str, Any]:
    """Return the report of a run that has no `report.json`.

    Args:
        run: the output directory.
        file: its `trainer_state.json`, or that of one of its checkpoints.

    Raises:
        UserError: a file cannot be read.
    """
    state = _read_json_object(file, "pass a run whose file is complete")
    _check_log(state, "log_history", file)
    report = report_from_log(run, state["log_history"], f"unknown: read from {file}")
    done, total = (state.get(name, 0) for name in ("global_step", "max_steps"))
    if not (isinstance(done, int) and isinstance(total, int)):
        raise UserError(
            f"{file}: 'global_step' or 'max_steps' is not a number; pass the --output_dir of a run"
        )
    return {**report, "steps": {"done": done, "total": total}}


def report_from_log(run: Path, log: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """Return the report of a run of which only its log and its flags in `run_args.yaml` are available.

    Args:
        run: the output directory.
        log: the records.
        status: status of the run, unless the log tells that it has finished.

    Raises:
        UserError: `run_args.yaml` cannot be read.
    """
    arguments = read_run_args(run)
    alphas = [record["dft_alpha"] for record in log if "dft_alpha" in record]
    alpha = alphas[-1] if alphas else arguments.get("dft_alpha")
    objective = arguments.get("objective", "dft")
    has_alpha = bool(alphas) or issubclass(OBJECTIVES.get(objective, Objective), Dft)
    method = "SFT" if alpha == 0 and objective == "dft" else objective.upper()
    ended = any("train_runtime" in record for record in log)
    return {
        **EMPTY_REPORT,
        "name": arguments.get("run_name") or run.absolute().name,
        "status": "finished" if ended else status,
        "method": None if alpha is None else method,
        "alpha": alpha if has_alpha else None,
        "model": {"name": arguments["model_name_or_path"]} if "model_name_or_path" in arguments else {},
        "arguments": arguments,
        "given": arguments,
        "log": log,
    }


def read_run_args(run: Path) -> dict[str, Any]:
    """Return the flags in the `run_args.yaml` of a run; an empty dict if there is no such file.

    Raises:
        UserError: the file is not a mapping of flags to values.
    """
    file = run / RUN_ARGS
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not valid YAML ({' '.join(str(error).split())}); fix or remove it"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a mapping of flags to values; fix or remove it")
    return content


def _read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        raise UserError(f"{file}: broken JSON ({error}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; {remedy}")
    return content


def _check_log(content: dict[str, Any], key: str, file: Path) -> None:
    log = content.get(key)
    if not isinstance(log, list) or not all(map(is_record, log)):
        raise UserError(f"{file}: {key!r} is not a list of records; pass the --output_dir of a run")
