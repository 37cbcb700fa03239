"""Check the dtype of the weights that are trained, as they were loaded and whatever the flags say."""

import torch
from transformers import PreTrainedModel

from dft.arguments.conflicts import UNSCALABLE
from dft.arguments.model import DTYPES
from dft.arguments.parser import Arguments
from dft.errors import UserError


def check_trained_dtype(model: PreTrainedModel, arguments: Arguments) -> None:
    """Raise `UserError` for float16 weights whose gradients would have to be unscaled.

    torch refuses it at the first step. Under FSDP the weights are float32 by then, and DeepSpeed keeps
    float32 master weights.
    """
    training = arguments.training
    if training.deepspeed or training.fsdp or not training.fp16:
        return
    if torch.float16 in trained_dtypes(model):
        raise UserError(f"{_source(arguments)} float16 {UNSCALABLE}")


def dtype_notes(model: PreTrainedModel, arguments: Arguments) -> list[str]:
    """Return notes about weights in a dtype that loses updates, or that the flags did not ask for."""
    training, requested = arguments.training, arguments.model.torch_dtype
    notes = []
    if requested in DTYPES and model.dtype != DTYPES[requested]:
        compute = "the dtype of --bf16 or --fp16, and float32 without them"
        notes.append(
            f"--torch_dtype {requested} has no effect: under ZeRO-3 transformers loads weights in {compute}"
        )
    upcast = training.fsdp and training.mixed_precision != "no"  # accelerate keeps float32 master weights
    half = {dtype for dtype in trained_dtypes(model) if dtype.itemsize == 2}
    if half and not training.deepspeed and not upcast:
        smallest = max(torch.finfo(dtype).eps for dtype in half) / 2
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        notes.append(
            f"{_source(arguments)} {names}; without --deepspeed there are no float32 master weights, and "
            f"updates below about 1/{1 / smallest:,.0f} of a weight are lost; for small learning rates use "
            "--torch_dtype float32 with --bf16 True"
        )
    return notes


def trained_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """Return the dtypes of the parameters that are trained."""
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


def _source(arguments: Arguments) -> str:
    """Return the beginning of a message about the dtype of the weights, which is its next word."""
    if arguments.model.torch_dtype == "auto":
        return f"--torch_dtype auto: the weights of {arguments.model.model_name_or_path} are"
    return "weights in" if arguments.model.torch_dtype is None else "--torch_dtype"
