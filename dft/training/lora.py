"""LoRA: adapters that are trained in place of all weights (Hu et al., arXiv 2106.09685), by peft."""

import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, set_seed
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.data.files import write_whole
from dft.errors import UserError
from dft.training.throughput import shapes_digest

ALL_LINEAR = "all-linear"
PEFT = "0.21.2"
"""The version that the tests ran on."""
BASE_RECORD = "base_model.json"
"""Beside adapters: what tells the model they were trained on from one that they fit by chance."""


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


def quantization(lora: LoraArguments, training: transformers.TrainingArguments) -> BitsAndBytesConfig | None:
    """How the weights that are not trained are held; None as they are."""
    if not lora.load_in_4bit:
        return None
    computed_in = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed_in[training.mixed_precision],
    )


def add_adapters(
    model: PreTrainedModel, lora: LoraArguments, training: transformers.TrainingArguments, name: str
) -> nn.Module:
    """The model with adapters, which alone are trained; the same ones on every rank.

    Args:
        name: of the model, as the adapters will remember it.

    Raises:
        UserError: no module has a name that was asked for.
    """
    from peft import (
        LoraConfig,
        get_peft_model,
        prepare_model_for_kbit_training,
    )  # optional, and slow to import

    if lora.load_in_4bit:
        model = prepare_model_for_kbit_training(model, training.gradient_checkpointing)
    targets = lora.lora_target_modules or [ALL_LINEAR]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha or 2 * lora.lora_r,
        lora_dropout=lora.lora_dropout or 0.0,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    )
    set_seed(training.seed)  # loading may have drawn other numbers on other ranks
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules {' '.join(targets)}: {' '.join(str(error).split())}"
        ) from None
    folder = Path(name).expanduser()
    if folder.is_dir():  # from wherever it is loaded
        adapted.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    training.label_names = ["labels"]  # which Trainer cannot see through the adapters
    return adapted


def pack_linear(model: PreTrainedModel) -> None:
    """Gives a model on the meta device the shapes that its linear layers have when held in 4 bits."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            packed = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
            module.weight = nn.Parameter(packed, requires_grad=False)


def has_adapters(model: nn.Module) -> bool:
    if "peft" not in sys.modules:  # whose models there cannot be
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def write_base_record(folder: Path, model: nn.Module, shapes: str) -> None:
    """Notes beside adapters what model they were trained on.

    Args:
        shapes: `shapes_digest` of the model with its adapters, before it was sharded.
    """
    if vars(model.config).get("quantization_config") is not None:
        shapes = ""  # those of packed weights, which no model has that they would be merged into
    record = {"sizes": sizes_of(model), "shapes": shapes}
    write_whole(folder / BASE_RECORD, [json.dumps(record, indent=1), "\n"])


def sizes_of(model: nn.Module) -> dict[str, int]:
    """What is the same in whatever way the weights are held."""
    config = model.config.get_text_config()
    return {"vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers}


def other_than_recorded(folder: Path, model: nn.Module) -> str | None:
    """What tells a model with its adapters from the one they were trained on.

    None where nothing does, or nothing is known: adapters of another program have no record.

    Raises:
        UserError: the record cannot be read.
    """
    path = folder / BASE_RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        sizes, shapes = dict(record["sizes"]), record["shapes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it is damaged: take the adapters of "
            "another checkpoint"
        ) from None
    for name, size in sizes_of(model).items():
        if sizes.get(name) != size:
            return f"its {name} is {size} in place of {sizes.get(name)}"
    if shapes and shapes_digest(model) != shapes:
        return "its weights have other names or shapes"
    return None
