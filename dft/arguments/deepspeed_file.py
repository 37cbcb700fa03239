"""Read and validate DeepSpeed configuration files.

DeepSpeed itself validates most of a configuration only when it creates the engine, which is after the data
has been prepared and the model loaded.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from dft.errors import UserError
from dft.program import shipped_folder
from dft.strict_json import refuse_repeated_keys

SECTIONS = (
    "zero_optimization", "bf16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params",
    "tensor_parallel", "activation_checkpointing", "data_types",
)  # fmt: skip
"""Sections that transformers and accelerate read without checking their type."""
SHIPPED = shipped_folder("ds_config")
"""Folder of the configurations that --deepspeed finds by name."""


def find_deepspeed(config: str | None) -> str | None:
    """Return the file that --deepspeed selects: a path, or the name of a shipped configuration.

    Args:
        config: the value of the flag. A file of this name has precedence over a shipped configuration. JSON
            and a path without a file, which `read_deepspeed` reports, are returned as they are.
    """
    if not config or config.startswith("{") or Path(config).is_file():
        return config
    for file in shipped_configurations():
        if config in (file.stem, file.name):
            return str(file)
    return config


def shipped_configurations() -> list[Path]:
    """Return the configurations that --deepspeed finds by name."""
    return sorted(SHIPPED.glob("*.json"))


def deepspeed_flag(config: str | dict[str, Any]) -> str:
    """Return the flag and its value for the beginning of messages. A shipped configuration has its name."""
    if not isinstance(config, str):
        return "the DeepSpeed settings of accelerate launch"
    is_shipped = config.startswith(str(SHIPPED / ""))
    return f"--deepspeed {Path(config).stem if is_shipped else config}"


def zero_stage(config: str | dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration.

    Args:
        config: the path of a file, JSON, or a configuration that is already parsed.

    Raises:
        UserError: the configuration cannot be read.
    """
    return read_deepspeed(config).get("zero_optimization", {}).get("stage", 0)


def read_deepspeed(config: str | dict[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Args:
        config: the path of a file, JSON, or a configuration that is already parsed.

    Raises:
        UserError: there is no such file, it is not a JSON object, or a section of it is not an object.
    """
    if isinstance(config, dict):
        return config
    if not (config.startswith("{") or Path(config).is_file()):
        names = ", ".join(file.stem for file in shipped_configurations())
        raise UserError(
            f"--deepspeed {config}: no such file, and not the name of a shipped configuration ({names})"
        )
    try:
        text = config if config.startswith("{") else Path(config).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except ValueError as error:
        raise UserError(f"--deepspeed {config}: not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"--deepspeed {config}: not valid JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed {config}: expected a JSON object")
    for name in SECTIONS:
        section: Any = content
        for part in name.split("."):
            section = section.get(part, {})
        if not isinstance(section, dict):
            raise UserError(f"--deepspeed {config}: {name!r} must be an object, got {json.dumps(section)}")
    return content


def check_parts(content: dict[str, Any], flag: str) -> None:
    """Raise `UserError` for settings that DeepSpeed would reject later.

    Args:
        content: the configuration.
        flag: the flag and its value, used as the beginning of messages.
    """
    # DeepSpeed is slow to import and is needed only here.
    from deepspeed.runtime import config, lr_schedules
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        config._reject_removed_config_keys(content)
    except config.DeepSpeedConfigError as error:
        raise UserError(f"{flag}: {error}") from None
    sections = {
        "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config
    }  # fmt: skip
    for name, section in sections.items():
        try:
            section(**content.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *map(str, first["loc"])])
            raise UserError(f"{flag}: {where}: {first['msg']}, got {first['input']!r}") from None
    _check_optimizer(content, flag)
    kind, params = _part(content, "scheduler")
    if kind is not None:
        schedulers = vars(torch.optim.lr_scheduler) | vars(lr_schedules)
        if kind not in schedulers:
            raise UserError(f"{flag}: DeepSpeed has no scheduler {kind!r}")
        _check_names(flag, "scheduler", params, set(), schedulers[kind])


def _check_optimizer(content: dict[str, Any], flag: str) -> None:
    """Raise `UserError` for an optimizer that does not exist, or that ZeRO does not support."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    kind, params = _part(content, "optimizer")
    if kind is None:
        return
    name = kind.lower()
    if name == config.MUON_OPTIMIZER:
        raise UserError(
            f"{flag}: under ZeRO, Muon replaces the gradients by its updates before their norm is computed, "
            "so grad_norm would be that of the updates and --max_grad_norm would shorten them; use AdamW"
        )
    if name in (config.ADAM_OPTIMIZER, config.ADAMW_OPTIMIZER):
        extra = {config.TORCH_ADAM_PARAM, config.ADAM_W_MODE}
        _check_names(flag, "optimizer", params, extra, FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW)
        return
    is_tested = name in (config.LION_OPTIMIZER, config.ADAGRAD_OPTIMIZER)
    if name not in config.DEEPSPEED_OPTIMIZERS:
        if kind not in vars(torch.optim):
            raise UserError(f"{flag}: DeepSpeed has no optimizer {kind!r}")
        _check_names(flag, "optimizer", params, set(), vars(torch.optim)[kind])
        is_tested = vars(torch.optim)[kind] in ZERO_SUPPORTED_OPTIMIZERS
    if not is_tested and not content.get("zero_allow_untested_optimizer", False):
        raise UserError(
            f"{flag}: DeepSpeed has not tested the optimizer {kind!r} under ZeRO; use AdamW, or allow it "
            "with 'zero_allow_untested_optimizer: true'"
        )


def _part(content: dict[str, Any], name: str) -> tuple[str | None, dict[str, Any]]:
    """Return the type and parameters of the optimizer or scheduler."""
    section = content.get(name, {})
    kind = section.get("type")
    return None if kind is None else str(kind), section.get("params", {})


def _check_names(flag: str, part: str, params: dict[str, Any], extra: set[str], *kinds: type) -> None:
    """Raise `UserError` for a parameter that is neither in `extra` nor accepted by any of the classes."""
    names = extra.union(*(inspect.signature(kind).parameters for kind in kinds))
    for name in params:
        if name not in names:
            raise UserError(
                f"{flag}: {part}.params has no {name!r}; expected one of {', '.join(sorted(names))}"
            )


def zero_of(training: transformers.TrainingArguments) -> tuple[int, bool, bool]:
    """Return the ZeRO stage (0: no DeepSpeed), and whether optimizer and weights are offloaded."""
    if not training.deepspeed:
        return 0, False, False
    get = training.hf_deepspeed_config.get_value
    offloaded = [
        get(f"zero_optimization.offload_{part}.device", "none") != "none" for part in ("optimizer", "param")
    ]
    return get("zero_optimization.stage", 0), *offloaded
