"""Changes to the private state of other libraries, each with the version it was written for.

`PATCHES` lists all of them, including those in `dft.ranks`, which are needed before arguments can be parsed.
tests/training/test_contract.py checks that each patched library still has the patched code.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate.utils.other
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel, masking_utils
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightTransform
from transformers.integrations.mxfp4 import Mxfp4Dequantize


@dataclass(frozen=True)
class LibraryPatch:
    """A change to private state of a library.

    Attributes:
        where: dotted name of the function that makes the change.
        package: the library.
        version: major and minor version that it was written for.
        changes: description of the change.
        reason: why there is no public way.
    """

    where: str
    package: str
    version: str
    changes: str
    reason: str


PATCHES = (
    LibraryPatch(
        where="dft.training.patches.fix_zero3_universal_load",
        package="deepspeed",
        version="0.19",
        changes="param_groups and step counters of the optimizer inside DeepSpeedZeroOptimizer_Stage3",
        reason="loading a universal checkpoint under ZeRO-3 gives all groups the options of the first one "
        "and lets all parameters share one step counter; there is no option to load them correctly",
    ),
    LibraryPatch(
        where="dft.training.patches.set_step_skipped",
        package="accelerate",
        version="1.15",
        changes="AcceleratedOptimizer._is_overflow",
        reason="Trainer keeps the learning rate of a skipped step only if accelerate reports the step as "
        "skipped, and accelerate sets that flag with a loss scale alone",
    ),
    LibraryPatch(
        where="dft.training.patches.skip_deepspeed_import",
        package="accelerate",
        version="1.15",
        changes="accelerate.utils.other.is_deepspeed_available",
        reason="accelerate imports DeepSpeed in every run, to find out whether a model is in its engine; no "
        "option prevents it",
    ),
    LibraryPatch(
        where="dft.training.patches.set_update_skipped",
        package="torch",
        version="2.13",
        changes="the attribute found_inf of Adam and AdamW",
        reason="their fused implementation skips an update on the device if that number is 1, which saves "
        "waiting for the gradient norm; only a loss scale sets it, in float16",
    ),
    LibraryPatch(
        where="dft.training.patches.masks_without_waiting",
        package="transformers",
        version="5.23",
        changes="transformers.masking_utils.find_packed_sequence_indices",
        reason="each forward waits for the device, to find out whether any row of a batch without attention "
        "mask holds several sequences; no argument says so",
    ),
    LibraryPatch(
        where="dft.training.patches.hidden_argument_mismatch",
        package="transformers",
        version="5.23",
        changes="a filter on the logger transformers.trainer_utils",
        reason="Trainer warns that it takes logging_steps, eval_steps and save_steps from the checkpoint; "
        "DFTTrainer takes them from the arguments, and the warning cannot be switched off",
    ),
    LibraryPatch(
        where="dft.training.patches.keep_source_names",
        package="transformers",
        version="5.23",
        changes="PreTrainedModel._weight_conversions",
        reason="saving reverts the conversions recorded there. Under ZeRO-3 they include those that loading "
        "did not use, and a base prefix that the files lack is not among them, so saved weights would get "
        "other names than the loaded ones",
    ),
    LibraryPatch(
        where="dft.ranks.enable_cpu_sharding",
        package="accelerate",
        version="1.15",
        changes="PartialState.distributed_type",
        reason="accelerate offers FSDP to ranks it calls multi-GPU alone, and would train whole copies on "
        "CPU ranks without a warning",
    ),
    LibraryPatch(
        where="dft.ranks.init_cpu_deepspeed",
        package="deepspeed",
        version="0.19",
        changes="deepspeed.ops.__compatible_ops__['deepspeed_shm_comm']",
        reason="DeepSpeed compiles this inference operator when ranks on CPU join, which takes half a minute "
        "or fails without a compiler; no option prevents it",
    ),
)
"""All patches of this package."""

ARGUMENT_MISMATCH = "Warning: The following arguments do not match the ones in the `trainer_state.json`"
"""Beginning of the hidden transformers warning."""


def fix_zero3_universal_load(optimizer: Any, folder: Path) -> None:
    """Restore state that DeepSpeed 0.19 loads incorrectly from a universal checkpoint under ZeRO-3.

    All parameter groups get the options of the first group, including its weight decay; and all parameters
    share one step counter, which is then incremented once per parameter.

    Args:
        optimizer: DeepSpeed's optimizer around that of torch.
        folder: the universal checkpoint that was loaded.
    """
    (state,) = folder.glob("global_step*/zero/optimizer_state.pt")
    # It contains DeepSpeed classes, and it was converted from a checkpoint whose owner has been checked.
    saved = torch.load(state, map_location="cpu", weights_only=False)["optimizer_state_dict"]["param_groups"]
    inner: torch.optim.Optimizer = optimizer.optimizer
    for group, options in zip(inner.param_groups, saved, strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
    for parameter_state in inner.state.values():
        if isinstance(parameter_state["step"], torch.Tensor):
            parameter_state["step"] = parameter_state["step"].clone()


def keep_source_names(model: PreTrainedModel, source: frozenset[str] | None) -> None:
    """Make `save_pretrained` write weights under the names that they were loaded from.

    Args:
        model: a model that `from_pretrained` returned.
        source: names of the weights in its files; None if they are not known.
    """
    conversions = vars(model).get("_weight_conversions")
    if conversions is not None:
        conversions = [
            conversion for conversion in conversions if conversion.was_used() and not _dequantizes(conversion)
        ]
        model._weight_conversions = conversions
    prefix = model.base_model_prefix
    if conversions or source is None or not prefix:
        return
    new = set(model.state_dict()) - source - model.all_tied_weights_keys.keys()
    if new and all(name.startswith(f"{prefix}.") for name in new):
        stripped = {name.removeprefix(f"{prefix}.") for name in new}
        if stripped <= source:
            model._weight_conversions = [PrefixChange(prefix_to_add=prefix)]


def _dequantizes(conversion: WeightTransform) -> bool:
    """Return whether a conversion converts MXFP4 weights, whose names saved weights must not have."""
    return isinstance(conversion, WeightConverter) and any(
        isinstance(operation, Mxfp4Dequantize) for operation in conversion.operations
    )


def set_step_skipped(optimizer: AcceleratedOptimizer, skipped: bool) -> None:
    """Set whether accelerate reports the last optimizer step as skipped (`optimizer_step_was_skipped`)."""
    optimizer._is_overflow = skipped


def skip_deepspeed_import() -> None:
    """Keep accelerate from importing DeepSpeed, which is slow, to find its engine around a model.

    A model can only be in the engine of a DeepSpeed that has been imported.
    """
    accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def set_update_skipped(optimizer: torch.optim.Optimizer, skipped: torch.Tensor | None) -> None:
    """Set whether the updates of a fused Adam or AdamW are skipped on the device.

    Args:
        optimizer: the optimizer.
        skipped: float32 scalar on the device of the parameters, 1 to skip, 0 not to; None to not ask.
    """
    if skipped is None:
        vars(optimizer).pop("found_inf", None)
    else:
        vars(optimizer)["found_inf"] = skipped


def _sequence_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the number of the sequence in its row that each token belongs to, (batch, seq)."""
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


@contextmanager
def masks_without_waiting() -> Iterator[None]:
    """Build masks without asking the device whether there are several sequences in a row.

    For attention that needs no mask for such rows. Other attention would get a mask that it could do without.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _sequence_numbers
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ARGUMENT_MISMATCH)


@contextmanager
def hidden_argument_mismatch() -> Iterator[None]:
    """Hide Trainer's warning that a checkpoint was written with other logging, evaluation or save steps."""
    logger = logging.getLogger("transformers.trainer_utils")
    logger.addFilter(_is_shown)
    try:
        yield
    finally:
        logger.removeFilter(_is_shown)
