"""DeepSpeed's configuration file, read strictly, and its parts asked whether they accept what it says.

DeepSpeed itself looks at most of it only when the engine is made, after the data and the model.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from dft.errors import UserError
from dft.strict_json import refuse_repeated_keys

SECTIONS = (
    "zero_optimization", "bf16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params",
    "tensor_parallel", "activation_checkpointing", "data_types",
)  # fmt: skip
"""Of a DeepSpeed configuration, those that transformers and accelerate look into without asking."""


def zero_stage(config: str) -> int:
    """Of a DeepSpeed configuration, a file or JSON.

    Raises:
        UserError: it cannot be read.
    """
    return read_deepspeed(config).get("zero_optimization", {}).get("stage", 0)


def read_deepspeed(config: str | dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration: a file, JSON, or what is read already.

    Raises:
        UserError: it is no file, no JSON object, or a section of it is none.
    """
    if isinstance(config, dict):
        return config
    if not (config.startswith("{") or Path(config).is_file()):
        raise UserError(f"--deepspeed {config}: no such file; the ones that come along are in ds_config/")
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


def check_parts(content: dict[str, Any], told: str) -> None:
    """Raises `UserError`, whose message begins with `told`, for what DeepSpeed would refuse later."""
    # slow to import, and only needed here
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime import config, lr_schedules
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        config._reject_removed_config_keys(content)
    except config.DeepSpeedConfigError as error:
        raise UserError(f"{told}: {error}") from None
    sections = {
        "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config
    }  # fmt: skip
    for name, section in sections.items():
        try:
            section(**content.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *map(str, first["loc"])])
            raise UserError(f"{told}: {where}: {first['msg']}, got {first['input']!r}") from None
    kind, params = _part(content, "optimizer")
    if kind is not None and kind.lower() in (config.ADAM_OPTIMIZER, config.ADAMW_OPTIMIZER):
        own = {config.TORCH_ADAM_PARAM, config.ADAM_W_MODE}
        _check_names(told, "optimizer", params, own, FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW)
    elif kind is not None and kind.lower() not in config.DEEPSPEED_OPTIMIZERS:
        if kind not in vars(torch.optim):
            raise UserError(f"{told}: DeepSpeed has no optimizer {kind!r}")
        _check_names(told, "optimizer", params, set(), vars(torch.optim)[kind])
    kind, params = _part(content, "scheduler")
    if kind is not None:
        known = vars(torch.optim.lr_scheduler) | vars(lr_schedules)
        if kind not in known:
            raise UserError(f"{told}: DeepSpeed has no scheduler {kind!r}")
        _check_names(told, "scheduler", params, set(), known[kind])


def _part(content: dict[str, Any], name: str) -> tuple[str | None, dict[str, Any]]:
    """Type and parameters of the optimizer or the scheduler."""
    section = content.get(name, {})
    kind = section.get("type")
    return None if kind is None else str(kind), section.get("params", {})


def _check_names(told: str, part: str, params: dict[str, Any], own: set[str], *kinds: type) -> None:
    known = own.union(*(inspect.signature(kind).parameters for kind in kinds))
    for name in params:
        if name not in known:
            raise UserError(f"{told}: {part}.params has no {name!r}; it has {', '.join(sorted(known))}")


def zero_of(training: transformers.TrainingArguments) -> tuple[int, bool, bool]:
    """Stage of ZeRO (0 without DeepSpeed), whether the optimizer and whether the weights are offloaded."""
    if not training.deepspeed:
        return 0, False, False
    get = training.hf_deepspeed_config.get_value
    away = [
        get(f"zero_optimization.offload_{what}.device", "none") != "none" for what in ("optimizer", "param")
    ]
    return get("zero_optimization.stage", 0), *away
