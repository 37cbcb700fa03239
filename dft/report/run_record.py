"""The record of a run that trackers and `report.json` store."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_model_param_count

from dft.arguments.config_file import SECRETS, plain
from dft.arguments.objective import build_objective
from dft.arguments.parser import Arguments, default_flags
from dft.loss.schedule import alpha_of
from dft.report.terminal.start_and_end import adapter_loader, resolved_settings

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "deepspeed")
ROOT = Path(__file__).parent.parent.parent


def run_record(arguments: Arguments, model: PreTrainedModel, data: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a run before its first step, as values that JSON can store.

    Args:
        arguments: the parsed flags.
        model: the model to train.
        data: `PreparedData.report`.
    """
    training, settings = arguments.training, resolved_settings(arguments, model)
    objective = build_objective(arguments.dft)
    return {
        "name": training.run_name or Path(training.output_dir).name,
        "method": objective.title,
        "alpha": alpha_of(objective),
        "weight": objective.formula(),
        "model": {
            "name": arguments.model.model_name_or_path,
            "parameters": get_model_param_count(model),
            "weights": settings["weights"],
            "attention": settings["attention"],
            "adapter_loader": adapter_loader(arguments),
        },
        "arguments": resolved_arguments(arguments),
        "given": given_arguments(arguments),
        "environment": environment(settings, training.device),
        "data": data,
    }


def resolved_arguments(arguments: Arguments) -> dict[str, Any]:
    """Return every flag except secrets, with its resolved value."""
    groups = (arguments.model, arguments.data, arguments.dft, arguments.lora, arguments.watch)
    values = {name: value for group in groups for name, value in vars(group).items()}
    return _printable({**values, **arguments.training.to_sanitized_dict()})


def given_arguments(arguments: Arguments) -> dict[str, Any]:
    """Return the flags that differ from their defaults, with the values the user gave."""
    defaults = default_flags()
    return _printable({name: value for name, value in arguments.flags.items() if value != defaults[name]})


def _printable(values: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in values.items() if name not in SECRETS}


def environment(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return package versions, device, number of ranks and the git commit of this code.

    Args:
        settings: `dft.report.terminal.start_and_end.resolved_settings`.
        device: the device of this rank.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "git_commit": git_commit(ROOT),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": f"{device.type} ({name})",
        "ranks": settings["ranks"],
        "parallelism": settings["parallelism"],
        "computes_in": settings["computes_in"],
    }


def git_commit(folder: Path) -> str | None:
    """Return the checked-out commit of a repository, with a `+` if tracked files were modified.

    None if the folder is not the root of a repository. The environment with the installed package may lie
    inside another repository.
    """
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # git is missing, this is not a repository, or its disk does not respond


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True, timeout=30
    ).stdout
