"""Checks of a model's files and weights when it is loaded."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dft.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_weight_files(name: str) -> None:
    """Raise `UserError` if a model's folder has no weights, or has them only as a pickle.

    Loading a pickle can run arbitrary code. Models on the hub are loaded only from safetensors as well.

    Args:
        name: value of --model_name_or_path.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    pattern = "adapter_model.safetensors" if is_adapter else "*.safetensors"
    if any(folder.glob(pattern)):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not pickles:
        raise UserError(
            f"--model_name_or_path {name}: the folder holds no weights ({pattern}); name a model's folder"
        )
    raise UserError(
        f"--model_name_or_path {name}: its weights are there only as a pickle ({pickles[0]}), which may run "
        "any code when it is read; convert them to safetensors with a transformers version that reads only "
        'tensors from it: python -c "from transformers import AutoModelForCausalLM as Model; '
        f"Model.from_pretrained({name!r}).save_pretrained('NEW')\", and copy the tokenizer's files"
    )


def check_loaded_keys(loading: dict[str, Any], name: str) -> None:
    """Raise `UserError` for weights that are missing in the files or differ in shape.

    Args:
        loading: loading info of `from_pretrained`.
        name: value of --model_name_or_path.
    """
    if loading["mismatched_keys"]:
        weight, file_shape, config_shape = min(loading["mismatched_keys"])
        raise UserError(
            f"--model_name_or_path {name}: {weight} has the shape {list(file_shape)} in its files and "
            f"{list(config_shape)} by config.json; one of the two belongs to another model"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"--model_name_or_path {name}: {len(missing)} weights are not in its files "
            f"and would be random, including {', '.join(missing[:3])}; the files belong to another "
            "architecture or are incomplete"
        )


def unused_weights_note(loading: dict[str, Any]) -> str | None:
    """Return a note on weights in the files that the model does not use; None if it uses all.

    Args:
        loading: loading info of `from_pretrained`.
    """
    unused = sorted(loading["unexpected_keys"])
    if not unused:
        return None
    return (
        f"{len(unused)} weights in the model's files are not part of the model and are ignored, including "
        f"{', '.join(unused[:3])}"
    )


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise `UserError` for an encoder, because its attention sees the tokens to predict.

    Args:
        model: the loaded model.
        name: value of --model_name_or_path.
    """
    config = model.config.to_dict()
    is_encoder = config["model_type"] in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not (config.get("is_decoder") or config.get("causal")):
        raise UserError(
            f"--model_name_or_path {name}: {config['model_type']} is an encoder, whose attention sees the "
            "tokens that are to be predicted; choose a causal language model (or set 'is_decoder' in its "
            "config.json to true, if it was trained as one)"
        )


def check_finite(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise `UserError` on all ranks if a weight is NaN or infinite on any rank. This is a collective.

    Args:
        model: the loaded model; under ZeRO-3 each rank holds a part of every weight.
        name: value of --model_name_or_path.
        device: device of the process group.
    """
    parameters = dict(model.named_parameters())
    is_broken = [not _is_finite(parameter) for parameter in parameters.values()]
    flags = torch.tensor(is_broken, device=device, dtype=torch.int)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    broken = [parameter for parameter, flag in zip(parameters, flags.tolist(), strict=True) if flag]
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"--model_name_or_path {name}: values that are not finite (NaN, infinity) in {broken[0]}{others} "
            f"of {len(parameters)} weights; the files are damaged, or come from a training run that diverged"
        )


def _is_finite(parameter: Any) -> bool:
    """Return whether the part of a weight on this rank is finite."""
    values = parameter.detach()
    if "ds_tensor" in vars(parameter):  # partitioned, unless it was dequantized, which is loaded whole
        part = parameter.ds_tensor
        start = part.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
        values = part.detach()[: max(0, parameter.ds_numel - start)]  # the remainder is uninitialized padding
    if values.is_meta or not values.numel() or not values.is_floating_point():
        return True
    # The extremes are NaN if any value is NaN, and aminmax does not copy the tensor.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(values))
