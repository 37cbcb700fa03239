"""Command-line flags for LoRA and QLoRA."""

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import transformers
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.errors import UserError

ALL_LINEAR = "all-linear"
PEFT = "0.21.2"
"""The version that the tests ran on."""


@dataclass
class LoraArguments:
    """Adapters in place of all weights."""

    _argument_group_name: ClassVar[str] = "LoRA"

    lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of the adapters. Default: no adapters, all weights are trained."},
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "What an adapter adds counts alpha / r times. Default: twice the rank."},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of what goes into an adapter. Default: 0."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Names of the modules that get an adapter. Default: {ALL_LINEAR}, every linear layer "
            "but the output embedding."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA (arXiv 2305.14314): hold the weights that are not trained in 4 bits. Needs CUDA "
            "and bitsandbytes."
        },
    )


def check_lora(lora: LoraArguments, training: transformers.TrainingArguments, zero_stage: int) -> None:
    """Raises `UserError` for flags that make no sense, or a package that is missing."""
    if lora.lora_r is None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if vars(lora)[name] is not None:
                raise UserError(f"--{name} without --lora_r has no effect; give --lora_r, 16 for example")
        if lora.load_in_4bit:
            raise UserError("--load_in_4bit True: weights in 4 bits cannot be trained; give --lora_r 16, too")
        return
    for name in ("lora_r", "lora_alpha"):
        value = vars(lora)[name]
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be greater than 0")
    if lora.lora_dropout is not None and not 0 <= lora.lora_dropout < 1:
        raise UserError(f"--lora_dropout {lora.lora_dropout:g}: must be at least 0 and below 1")
    require("peft", f"--lora_r {lora.lora_r}", PEFT)
    if not lora.load_in_4bit:
        return
    if training.device.type != "cuda":
        raise UserError(
            "--load_in_4bit True: needs a CUDA GPU; without one leave it out, --lora_r works as well"
        )
    require("bitsandbytes", "--load_in_4bit True")
    if zero_stage == 3 or training.fsdp:
        raise UserError(
            "--load_in_4bit True: weights in 4 bits are not sharded; use DDP or ds_config/zero2.json, or "
            "leave 4 bits out"
        )


def refuse_adapters(name: str) -> None:
    """Raises `UserError` for a folder of adapters, whose model would be trained with or without them."""
    folder = Path(name).expanduser()
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(
            f"--model_name_or_path {name}: holds adapters; make one model of both, and train that: "
            f"python scripts/merge_lora.py {name} NEW"
        )


def require(package: str, flag: str, wanted: str | None = None) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        pinned = f"{package}=={wanted}" if wanted else package
        raise UserError(f"{flag}: {package} is not installed; pip install {pinned}") from None
