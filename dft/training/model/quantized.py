"""Models whose weights are saved in 4 bits."""

import json
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.quantization_config import Mxfp4Config, QuantizationConfigMixin

from dft.arguments.parser import Arguments
from dft.errors import UserError
from dft.training.model.adapters import has_adapters, resolve_quantization
from dft.training.model.weight_names import existing_file

MXFP4 = "mxfp4"


def resolve_loading(arguments: Arguments) -> QuantizationConfigMixin | None:
    """Return how weights are quantized or dequantized when they are loaded; None to load them as saved.

    Raises:
        UserError: the weights are saved in MXFP4 and --dequantize is not set, or the other way around.
    """
    name, dequantize = arguments.model.model_name_or_path, arguments.model.dequantize
    is_mxfp4 = saved_quantization(name) == MXFP4
    if is_mxfp4 and not dequantize:
        raise UserError(
            f"--model_name_or_path {name}: its weights are saved in 4 bits (MXFP4), which cannot be trained; "
            "--dequantize True converts them to --torch_dtype when they are loaded"
        )
    if dequantize and not is_mxfp4:
        raise UserError(
            f"--dequantize True has no effect: the weights of {name} are not saved in MXFP4; remove it"
        )
    if is_mxfp4 and arguments.lora.load_in_4bit:
        raise UserError(
            "--load_in_4bit True cannot be used with --dequantize True, which converts weights from 4 bits; "
            "remove --load_in_4bit"
        )
    return dequantization(name) or resolve_quantization(arguments.lora, arguments.training)


def dequantization(name: str) -> Mxfp4Config | None:
    """Return how to load weights that are saved in MXFP4 so that they can be trained; None for other weights.

    Args:
        name: folder, or name of a model on the hub.
    """
    return Mxfp4Config(dequantize=True) if saved_quantization(name) == MXFP4 else None


def loaded_quantization(model: Any) -> QuantizationConfigMixin | None:
    """Return how the frozen weights of a model were quantized or dequantized when they were loaded.

    Args:
        model: a model, with or without adapters. Without, its dequantized weights are saved as they are.
    """
    quantization: QuantizationConfigMixin | None = vars(model.config).get("quantization_config")
    if quantization is None and has_adapters(model):
        return dequantization(model.peft_config["default"].base_model_name_or_path)
    return quantization


def saved_quantization(name: str) -> str | None:
    """Return the method by which the weights of a model are quantized in its files; None if they are not.

    Args:
        name: folder, or name of a model on the hub.

    Raises:
        ValueError: its config.json is not JSON.
    """
    file = existing_file(name, CONFIG_NAME, local_only=False)
    config = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    return (config.get("quantization_config") or {}).get("quant_method")
