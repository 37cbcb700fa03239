"""Exponential moving average of the trained weights (Polyak and Juditsky, 1992), on each rank's own shard."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dft.errors import UserError
from dft.ranks import first_failure
from dft.training.checkpoints.folder import new_run_advice, reading

AVERAGE_FILE = "weight_average"
"""Stem of the files of a checkpoint that hold the average."""


class TrainedWeights(ABC):
    """The trained weights that this rank holds, and how the model gets other values for them.

    Attributes:
        is_sharded: whether ranks hold different weights.
    """

    is_sharded = True

    @abstractmethod
    def current(self) -> dict[str, Tensor]:
        """Return the weights that the optimizer updates, by name. Their storage may be shared."""

    @abstractmethod
    def set(self, values: dict[str, Tensor]) -> None:
        """Let the model compute with other values. All ranks must call it."""


class PlainWeights(TrainedWeights):
    """Weights of a model that is complete on each rank, or sharded by FSDP 2.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.is_sharded = bool(self._sharded_modules)
        self._reshard()
        self._parameters = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    def current(self) -> dict[str, Tensor]:
        return {name: _local(parameter) for name, parameter in self._parameters.items()}

    def set(self, values: dict[str, Tensor]) -> None:
        self._reshard()
        for name, weight in self.current().items():
            weight.copy_(values[name])

    def _reshard(self) -> None:
        """Drop gathered weights, which FSDP keeps after an evaluation and which would be outdated."""
        for module in self._sharded_modules:
            module.reshard()


def _local(parameter: nn.Parameter) -> Tensor:
    weight = parameter.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


class Zero3Weights(TrainedWeights):
    """Weights that ZeRO-3 shards.

    Args:
        model: the model.
        engine: DeepSpeed's engine around it.
    """

    def __init__(self, model: nn.Module, engine: Any) -> None:
        self._engine = engine
        self._parameters: dict[str, Any] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    def current(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param  # slow to import

        weights = self._parameters.items()
        return {name: safe_get_local_fp32_param(parameter).detach() for name, parameter in weights}

    def set(self, values: dict[str, Tensor]) -> None:
        self._engine.empty_partition_cache()  # drops gathered weights, which would be outdated
        for name, parameter in self._parameters.items():
            parameter.ds_tensor.data.copy_(values[name].view_as(parameter.ds_tensor))
        self._engine.optimizer.checkpoint_event_epilogue()  # gathers small weights, which stay gathered


class Zero2Weights(TrainedWeights):
    """Weights whose float32 copies ZeRO-1 or 2 shards.

    Args:
        engine: DeepSpeed's engine.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer

    def current(self) -> dict[str, Tensor]:
        partitions = self._optimizer.single_partition_of_fp32_groups
        return {f"partition_{number}": partition.detach() for number, partition in enumerate(partitions)}

    def set(self, values: dict[str, Tensor]) -> None:
        partitions = self.current()
        trained = {name: partition.clone() for name, partition in partitions.items()}
        for name, partition in partitions.items():
            partition.copy_(values[name])
        self._optimizer.update_lp_params()
        for name, partition in partitions.items():
            partition.copy_(trained[name])


def trained_weights(accelerator: Accelerator, model: nn.Module, forward: nn.Module) -> TrainedWeights:
    """Return the trained weights of this rank.

    Args:
        accelerator: the run's accelerator.
        model: the model, possibly wrapped by FSDP.
        forward: the model, possibly wrapped for training.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return PlainWeights(model)
    engine: Any = forward
    return Zero3Weights(model, engine) if engine.zero_optimization_stage() == 3 else Zero2Weights(engine)


class WeightAverage:
    """Average of the trained weights: a * decay + w * (1 - decay) after each optimizer step, in float32.

    It begins with the weights before the first step. All ranks must call every method.

    Args:
        decay: share of the old average in the new one; None to compute no average.
        accelerator: the run's accelerator.

    Attributes:
        values: the average of the weights that this rank holds, by name; empty if there is none.
    """

    def __init__(self, decay: float | None, accelerator: Accelerator) -> None:
        self.values: dict[str, Tensor] = {}
        self._accelerator = accelerator
        self._decay = decay
        self._weights: TrainedWeights | None = None
        self._is_applied = False

    def begin(self, model: nn.Module, forward: nn.Module, checkpoint: str | None) -> None:
        """Begin a run, with the average of the checkpoint that was loaded, if any.

        Args:
            model: the model, possibly wrapped by FSDP.
            forward: the model, possibly wrapped for training.
            checkpoint: folder of the checkpoint.

        Raises:
            UserError: see `load`.
        """
        if self._decay is None:
            return
        self._weights = trained_weights(self._accelerator, model, forward)
        self.values = {name: weight.float().clone() for name, weight in self._weights.current().items()}
        if checkpoint is not None:
            self.load(checkpoint)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step to the average."""
        if self._weights is None:
            return
        current = self._weights.current()
        names = [name for name, value in self.values.items() if value.numel()]  # shards may be empty
        if names:
            average = get_ema_multi_avg_fn(self._decay)
            average([self.values[name] for name in names], [current[name].float() for name in names], 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with the average in this context, which may be entered again within it."""
        if self._weights is None or self._is_applied:
            yield
            return
        with torch.no_grad():
            trained = {name: weight.clone() for name, weight in self._weights.current().items()}
            self._weights.set(self.values)
        self._is_applied = True
        try:
            yield
        finally:
            self._is_applied = False
            with torch.no_grad():
                self._weights.set(trained)

    def save(self, folder: Path, is_writer: bool) -> None:
        """Write the average into the folder of a checkpoint.

        Args:
            folder: the checkpoint.
            is_writer: whether this rank writes what all ranks hold.
        """
        if self._weights is not None and (self._weights.is_sharded or is_writer):
            save_file({name: value.contiguous() for name, value in self.values.items()}, folder / self._file)

    def load(self, checkpoint: str) -> None:
        """Replace the average by that of a checkpoint, if the run has one and the checkpoint too.

        Raises:
            UserError: the checkpoint was saved by another number of ranks, or in another form.
        """
        if self._weights is None:
            return
        folder = Path(checkpoint)
        path, failure, saved = folder / self._file, None, {}
        with reading(folder):
            if path.is_file():
                saved = load_file(path)
        shapes, expected = ({name: value.shape for name, value in of.items()} for of in (saved, self.values))
        if any(folder.glob(f"{AVERAGE_FILE}*.safetensors")) and shapes != expected:
            failure = (
                f"--resume_from_checkpoint {folder}: the average of --ema_decay was saved by another number "
                f"of ranks, or in another form, and this run needs {path.name}; resume with the same number "
                f"of ranks, or {new_run_advice(folder)}"
            )
        failure = first_failure(failure)
        if failure is not None:
            raise UserError(failure)
        for name, value in saved.items():
            self.values[name].copy_(value)

    @property
    def _file(self) -> str:
        assert self._weights is not None
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        shard = f"-{rank + 1}-of-{ranks}" if self._weights.is_sharded else ""
        return f"{AVERAGE_FILE}{shard}.safetensors"
