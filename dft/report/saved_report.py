"""Runs as they lie on disk: `report.json`, or what an older or interrupted run left behind."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.arguments.config_file import RUN_ARGS
from dft.errors import UserError

REPORT = "report.json"
PICTURE = "report.png"
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
EMPTY: dict[str, Any] = {
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
}
"""What a report has, if nothing is known of a run."""


def load_report(run: Path) -> dict[str, Any]:
    """The report of a run, or what `trainer_state.json`, its own or its newest checkpoint's, tells of it.

    Args:
        run: an output directory, or the `report.json` in it.

    Raises:
        UserError: no such run, or a file that is not what its name says.
    """
    if not run.exists():
        raise UserError(f"{run}: no such file or folder; give the --output_dir of a run")
    if run.is_file():
        return report_in(run)
    if (run / REPORT).is_file():
        return report_in(run / REPORT)
    state = state_of(run)
    if state is None:
        raise UserError(
            f"{run}: holds neither {REPORT} nor {TRAINER_STATE_NAME}, nor a checkpoint with the latter; give "
            "the --output_dir of a run that has logged something"
        )
    return report_of_state(run, state)


def folder_of(run: Path) -> Path:
    """The output directory that a run is given by."""
    return run.parent if run.is_file() else run


def report_in(file: Path) -> dict[str, Any]:
    """The content of a `report.json`."""
    report = _object_in(file, f"give the folder above it, or remove it to have {TRAINER_STATE_NAME} read")
    return {**EMPTY, "name": file.absolute().parent.name, **_with_log(report, "log", file)}


def state_of(run: Path) -> Path | None:
    """The `trainer_state.json` of an output directory, else that of its newest checkpoint that has one."""
    numbered = [
        (int(found[1]), place) for place in run.iterdir() if (found := CHECKPOINT.fullmatch(place.name))
    ]
    places = [run, *(place for _, place in sorted(numbered, reverse=True))]
    return next(
        (place / TRAINER_STATE_NAME for place in places if (place / TRAINER_STATE_NAME).is_file()), None
    )


def report_of_state(run: Path, file: Path) -> dict[str, Any]:
    """What can be told of a run that has no `report.json`."""
    state = _with_log(_object_in(file, "name a run whose file is whole"), "log_history", file)
    log = state["log_history"]
    given = arguments_of(run)
    alphas = [record["dft_alpha"] for record in log if "dft_alpha" in record]
    alpha = alphas[-1] if alphas else given.get("dft_alpha")
    objective = given.get("objective", "dft")
    method = "SFT" if alpha == 0 and objective == "dft" else objective.upper()
    ended = any("train_runtime" in record for record in log)
    return {
        **EMPTY,
        "name": given.get("run_name") or run.absolute().name,
        "status": "finished" if ended else f"unknown: read from {file}",
        "method": None if alpha is None else method,
        "alpha": alpha if alphas or objective in ("dft", "asft") else None,
        "model": {"name": given["model_name_or_path"]} if "model_name_or_path" in given else {},
        "arguments": given,
        "given": given,
        "steps": {"done": state.get("global_step", 0), "total": state.get("max_steps", 0)},
        "log": log,
    }


def arguments_of(run: Path) -> dict[str, Any]:
    """The flags in `run_args.yaml`; nothing where it is missing.

    Raises:
        UserError: the file is no mapping of flags.
    """
    file = run / RUN_ARGS
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not valid YAML ({' '.join(str(error).split())}); mend or remove it"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a mapping of flags to values; mend or remove it")
    return content


def _object_in(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        raise UserError(f"{file}: broken JSON ({error}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; {remedy}")
    return content


def _with_log(content: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    log = content.get(key)
    if not isinstance(log, list) or not all(isinstance(record, dict) for record in log):
        raise UserError(f"{file}: has no list of records {key!r}; give the --output_dir of a run")
    return content
