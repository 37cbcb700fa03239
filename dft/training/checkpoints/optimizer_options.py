"""Give the optimizer and the learning-rate schedule of a checkpoint the settings of the run that resumes.

torch, DeepSpeed and FSDP store the learning rate, the weight decay and the other options of an optimizer with
its state, and the base learning rates with the schedule. Loading them would override the flags.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FLAG_OPTIONS = ("betas", "eps", "weight_decay", "initial_lr", "fused", "foreach")
"""Options of a parameter group that flags determine. The others, such as step counters, are state."""


def read_options(optimizer: Optimizer | AcceleratedOptimizer) -> list[dict[str, Any]]:
    """Return the options in `FLAG_OPTIONS` of each parameter group."""
    return [{name: group[name] for name in FLAG_OPTIONS if name in group} for group in optimizer.param_groups]


def apply_options(
    optimizer: Optimizer | AcceleratedOptimizer, scheduler: Any, options: Sequence[Mapping[str, Any]]
) -> None:
    """Set the options of the parameter groups, and the learning rate that the schedule has at its position.

    Without a change of flags, this changes nothing.

    Args:
        optimizer: the optimizer with the state of the checkpoint.
        scheduler: its learning-rate schedule, created by this run, with the state of the checkpoint.
        options: `read_options` of the optimizer before the checkpoint was loaded.
    """
    for group, new in zip(optimizer.param_groups, options, strict=True):
        is_other_implementation = group.get("fused") != new.get("fused")
        group.update(new)
        if is_other_implementation:
            _move_step_counters(optimizer, group)
    inner = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    if isinstance(inner, LambdaLR):
        base = [group["initial_lr"] for group in options]
        rates = [rate * factor(inner.last_epoch) for rate, factor in zip(base, inner.lr_lambdas, strict=True)]
        inner.load_state_dict({**inner.state_dict(), "base_lrs": base, "_last_lr": rates})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            set_learning_rate(group, rate)
    elif (position := inner.state_dict().get("last_batch_iteration", -1)) >= 0:
        inner.step(position)  # a schedule of DeepSpeed; the argument is the position to compute the rate for


def _move_step_counters(optimizer: Optimizer | AcceleratedOptimizer, group: Mapping[str, Any]) -> None:
    """Put the step counters of Adam where its implementation has them: on the device if it is fused."""
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        if "step" in state:
            state["step"] = state["step"].to(parameter.device if group["fused"] else "cpu")


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group, in place if it is a tensor that compiled code reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def learning_rate(optimizer: Optimizer | AcceleratedOptimizer) -> float:
    """Return the learning rate of the next update, of the first parameter group."""
    rate = optimizer.param_groups[0]["lr"]
    return rate.item() if isinstance(rate, Tensor) else rate
