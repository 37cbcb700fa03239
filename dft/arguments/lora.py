"""Command-line flags for LoRA and QLoRA."""

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, ClassVar

import transformers
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.bounds import Bounds
from dft.errors import UserError

ALL_LINEAR = "all-linear"
PEFT_VERSION = "0.21.2"
"""The version of peft that is tested."""


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
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA (arXiv 2305.14314): quantize the frozen weights to 4 bits. Needs CUDA and "
            "bitsandbytes."
        },
    )


def check_lora(lora: LoraArguments, training: transformers.TrainingArguments, zero_stage: int) -> None:
    """Raise `UserError` for contradictory adapter flags, or if a required package is missing."""
    if lora.lora_r is None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if vars(lora)[name] is not None:
                raise UserError(f"--{name} has no effect without --lora_r; add --lora_r, for example 16")
        if lora.load_in_4bit:
            raise UserError(
                "--load_in_4bit True: 4-bit weights cannot be trained; add adapters with --lora_r 16"
            )
        return
    check_installed("peft", f"--lora_r {lora.lora_r}", PEFT_VERSION)
    if not lora.load_in_4bit:
        return
    if training.device.type != "cuda":
        raise UserError("--load_in_4bit True needs a CUDA GPU; remove it, --lora_r works without it")
    check_installed("bitsandbytes", "--load_in_4bit True")
    if zero_stage == 3 or training.fsdp:
        raise UserError(
            "--load_in_4bit True: 4-bit weights cannot be sharded; use DDP or ds_config/zero2.json, or "
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
            f"first and train that: python scripts/merge_lora.py {name} NEW"
        )


def check_installed(package: str, flag: str, pinned_version: str | None = None) -> None:
    """Raise `UserError` if a package that a flag needs is not installed."""
    try:
        version(package)
    except PackageNotFoundError:
        requirement = f"{package}=={pinned_version}" if pinned_version else package
        raise UserError(f"{flag}: {package} is not installed; pip install {requirement}") from None
