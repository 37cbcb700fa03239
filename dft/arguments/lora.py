"""Command-line flags for LoRA and QLoRA."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import transformers
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.bounds import Bounds
from dft.errors import UserError
from dft.program import command_of
from dft.strict_json import MAX_SHOWN, refuse_repeated_keys

ALL_LINEAR = "all-linear"
PEFT_VERSION = "0.21.2"
"""The version of peft that is tested."""
CHANGES_BASE = (
    "; initializations such as pissa or olora change the weights of the model, so adapters would not fit "
    "the model on disk"
)


@dataclass
class LoraArguments:
    """Adapter flags."""

    _argument_group_name: ClassVar[str] = "LoRA"

    lora_r: Annotated[int | None, Bounds(above=0)] = field(
        default=None,
        metadata={"help": "Rank of the adapters. Default: no adapters; all weights are trained."},
    )
    lora_alpha: Annotated[int | None, Bounds(above=0)] = field(
        default=None,
        metadata={"help": "The output of an adapter is scaled by lora_alpha / lora_r. Default: 2 * lora_r."},
    )
    lora_dropout: Annotated[float | None, Bounds(minimum=0, below=1)] = field(
        default=None, metadata={"help": "Dropout on the input of the adapters. Default: 0."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Names of the modules that get an adapter. Default: {ALL_LINEAR}, all linear layers "
            "except the output embedding."
        },
    )
    lora_args: str | None = field(
        default=None,
        metadata={
            "help": "Further options of peft's LoraConfig as a JSON object, such as "
            "'{\"use_dora\": true}' or '{\"use_rslora\": true}'."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA (arXiv 2305.14314): quantize the frozen weights to 4 bits. Needs CUDA and "
            "bitsandbytes."
        },
    )


@dataclass(frozen=True)
class LoraOption:
    """An option of peft's LoraConfig that `--lora_args` accepts.

    Attributes:
        accepts: returns whether a value, as JSON is parsed, is valid.
        expected: description of the valid values.
        scales: whether another value would scale adapters differently that are trained already.
    """

    accepts: Callable[[Any], bool]
    expected: str
    scales: bool = False


def _is_switch(value: Any) -> bool:
    return type(value) is bool


def _is_expression(value: Any) -> bool:
    """Return whether a value is a valid regular expression. A plain name is one, too."""
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return bool(value)


def _is_names(value: Any) -> bool:
    return _is_expression(value) or (
        isinstance(value, list) and bool(value) and all(map(_is_expression, value))
    )


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(type(number) is int and number >= 0 for number in numbers)


def _is_pattern(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value maps expressions to finite positive numbers. A boolean is not a number."""
    return isinstance(value, dict) and all(
        _is_expression(name) and type(number) in kinds and 0 < number < math.inf
        for name, number in value.items()
    )


NAMES = LoraOption(_is_names, "a list of names, or a regular expression")
LORA_OPTIONS = {
    "use_dora": LoraOption(_is_switch, "true or false", scales=True),
    "use_rslora": LoraOption(_is_switch, "true or false", scales=True),
    "init_lora_weights": LoraOption(
        lambda value: _is_switch(value) or value in ("gaussian", "orthogonal"),
        "true, false, gaussian or orthogonal",
    ),
    "rank_pattern": LoraOption(
        lambda value: _is_pattern(value, (int,)), "an object of names and ranks above 0", scales=True
    ),
    "alpha_pattern": LoraOption(
        lambda value: _is_pattern(value, (int, float)), "an object of names and alphas above 0", scales=True
    ),
    "exclude_modules": NAMES,
    "layers_to_transform": LoraOption(_is_layers, "a layer number, or a list of them, from 0"),
    "layers_pattern": NAMES,
}
"""The options of peft that `--lora_args` accepts."""
OF_NAMED_MODULES = ("layers_to_transform", "layers_pattern")
"""Options that peft applies only to modules that are named."""
LORA_FLAGS = {
    "r": "--lora_r", "lora_alpha": "--lora_alpha", "lora_dropout": "--lora_dropout",
    "target_modules": "--lora_target_modules",
}  # fmt: skip
"""The options of peft that have a flag."""


def lora_options(lora: LoraArguments) -> dict[str, Any]:
    """Return the options of `--lora_args`.

    Raises:
        UserError: it is not a JSON object of supported options.
    """
    if lora.lora_args is None:
        return {}
    flag = f"--lora_args {shorten_text(lora.lora_args)}"
    try:
        options = json.loads(lora.lora_args, object_pairs_hook=refuse_repeated_keys)
    except ValueError as error:
        raise UserError(f"{flag}: not valid JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{flag}: not valid JSON (nested too deeply)") from None
    if not isinstance(options, dict):
        raise UserError(f"{flag}: expected a JSON object such as '{{\"use_dora\": true}}'")
    for name, value in options.items():
        if name in LORA_FLAGS:
            raise UserError(f"{flag}: {name} has a flag of its own, {LORA_FLAGS[name]}")
        if name not in LORA_OPTIONS:
            raise UserError(
                f"{flag}: {name} is not supported; the options of peft that are: {', '.join(LORA_OPTIONS)}"
            )
        if not LORA_OPTIONS[name].accepts(value):
            raise UserError(
                f"{flag}: {name} must be {LORA_OPTIONS[name].expected}, got {json.dumps(value)}"
                f"{CHANGES_BASE if isinstance(value, str) and name == 'init_lora_weights' else ''}"
            )
        if name in OF_NAMED_MODULES and lora.lora_target_modules in (None, [ALL_LINEAR]):
            raise UserError(
                f"{flag}: {name} needs the names of modules; add --lora_target_modules, for example "
                "q_proj v_proj"
            )
    return options


def shorten_text(text: str) -> str:
    """Return a text, truncated to `MAX_SHOWN` characters."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def check_lora(lora: LoraArguments, training: transformers.TrainingArguments, zero_stage: int) -> None:
    """Raise `UserError` for contradictory adapter flags, or if a required package is missing."""
    if lora.lora_r is None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_args"):
            if vars(lora)[name] is not None:
                raise UserError(f"--{name} has no effect without --lora_r; add --lora_r, for example 16")
        if lora.load_in_4bit:
            raise UserError(
                "--load_in_4bit True: 4-bit weights cannot be trained; add adapters with --lora_r 16"
            )
        return
    check_installed("peft", f"--lora_r {lora.lora_r}", PEFT_VERSION)
    lora_options(lora)
    if not lora.load_in_4bit:
        return
    if training.device.type != "cuda":
        raise UserError("--load_in_4bit True needs a CUDA GPU; remove it, --lora_r works without it")
    check_installed("bitsandbytes", "--load_in_4bit True")
    if zero_stage == 3 or training.fsdp:
        raise UserError(
            "--load_in_4bit True: 4-bit weights cannot be sharded; use DDP or --deepspeed zero2, or "
            "remove --load_in_4bit"
        )


def check_freeze(patterns: list[str] | None, lora: LoraArguments) -> None:
    """Raise `UserError` for `--freeze` without patterns, or with adapters, which train nothing else."""
    if patterns == []:
        raise UserError("--freeze: name at least one pattern, such as 'model.layers.[0-7].*'")
    if patterns and lora.lora_r is not None:
        raise UserError(
            f"--freeze {' '.join(patterns)} has no effect with --lora_r {lora.lora_r}, which trains adapters "
            "alone; choose the modules that get one by --lora_target_modules"
        )


def check_not_adapters(name: str) -> None:
    """Raise `UserError` if `--model_name_or_path` is an adapter folder instead of a model."""
    folder = Path(name).expanduser()
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(
            f"--model_name_or_path {name}: holds adapters, not a model; merge them into their base model "
            f"first and train that: {command_of('scripts/merge_lora.py')} {name} NEW"
        )


def check_installed(package: str, flag: str, pinned_version: str | None = None) -> None:
    """Raise `UserError` if a package that a flag needs is not installed."""
    try:
        version(package)
    except PackageNotFoundError:
        requirement = f"{package}=={pinned_version}" if pinned_version else package
        raise UserError(f"{flag}: {package} is not installed; pip install {requirement}") from None
