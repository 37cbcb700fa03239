"""LoRA: adapters that are trained in place of all weights (Hu et al., arXiv 2106.09685), by peft."""

import json
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, set_seed

from dft.arguments.lora import ALL_LINEAR, LoraArguments
from dft.errors import UserError
from dft.files import write_atomically
from dft.training.parameters import shapes_digest

BASE_RECORD = "base_model.json"
"""Beside adapters: what tells the model they were trained on from one that they fit by chance."""


def resolve_quantization(
    lora: LoraArguments, training: transformers.TrainingArguments
) -> BitsAndBytesConfig | None:
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
    write_atomically(folder / BASE_RECORD, [json.dumps(record, indent=1), "\n"])


def sizes_of(model: nn.Module) -> dict[str, int]:
    """What is the same in whatever way the weights are held."""
    config = model.config.get_text_config()
    return {"vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers}


def base_model_mismatch(folder: Path, model: nn.Module) -> str | None:
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
