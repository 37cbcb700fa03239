"""Skip an optimizer step on the device, so that the host does not wait for the gradient norm of the step."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from dft.training.checkpoints.optimizer_options import learning_rate
from dft.training.host_copy import DEVICE_TYPES, HostCopy
from dft.training.patches import set_update_skipped

OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam)
"""Optimizers whose fused implementation reads on the device whether to make the update.

SGD is not among them: if its first step is skipped, its momentum is never initialized.
"""


@dataclass(frozen=True)
class ScheduleState:
    """The position of a learning-rate schedule, and the options of the optimizer at that position."""

    optimizer: AcceleratedOptimizer
    scheduler: Any
    schedule: dict[str, Any]
    options: list[dict[str, Any]]

    @classmethod
    def capture(cls, optimizer: AcceleratedOptimizer, scheduler: Any) -> "ScheduleState":
        """Capture the current position. Does not synchronize with the device."""
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        return cls(optimizer, scheduler, copy.deepcopy(scheduler.state_dict()), options)

    def restore(self) -> float:
        """Return to the position, and return its learning rate."""
        self.scheduler.load_state_dict(self.schedule)
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update(options)
        return learning_rate(self.optimizer)


def can_skip_on_device(norm: Tensor | float, optimizer: AcceleratedOptimizer) -> bool:
    """Return whether a step of the optimizer can be skipped on the device.

    Args:
        norm: gradient norm of the step.
        optimizer: accelerate's; must not be wrapped by DeepSpeed or FSDP, nor have a loss scale.
    """
    if not isinstance(norm, Tensor) or norm.device.type not in DEVICE_TYPES or isinstance(norm, DTensor):
        return False
    inner = optimizer.optimizer
    if type(inner) not in OPTIMIZERS:
        return False
    return all(
        group["fused"] and isinstance(group["lr"], float) and _are_plain(group["params"], norm.device)
        for group in inner.param_groups
    )


def _are_plain(parameters: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether the parameters are on the device and none of them is sharded."""
    return all(parameter.device == device and not isinstance(parameter, DTensor) for parameter in parameters)


def skip_if_nonfinite(norm: Tensor, optimizer: AcceleratedOptimizer) -> HostCopy:
    """Make the next update of the optimizer change nothing if the norm is not finite.

    Neither the weights nor the state of the optimizer change, including its step counters. Does not
    synchronize with the device.

    Returns:
        1 if the norm is not finite, else 0.
    """
    is_nonfinite = norm.detach().isfinite().logical_not().to(torch.float32)
    set_update_skipped(optimizer.optimizer, is_nonfinite)
    return HostCopy(is_nonfinite)
