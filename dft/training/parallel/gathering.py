"""Run a model whose weights ZeRO-3 has partitioned, before there is a DeepSpeed engine."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dft.training.parameters import is_partitioned


@contextmanager
def gathering_weights(model: PreTrainedModel) -> Iterator[None]:
    """Gather the weights of each layer while it runs, in this context.

    All ranks must run the model equally often. An engine would do the same, and prefetch the next layer, but
    transformers' Trainer cannot train with a model that was wrapped for inference. A decoder layer is
    gathered as a whole, because layers may use the weights of their parts directly; modules outside of the
    layers are gathered one by one. Without ZeRO-3 this changes nothing.

    Args:
        model: a model without adapters, or with them.
    """
    if not is_partitioned(model):
        yield
        return
    with ExitStack() as hooks:
        for module, parameters in _groups(model):
            gathered = _Gathered(parameters)
            hooks.callback(module.register_forward_pre_hook(gathered.enter).remove)
            hooks.callback(module.register_forward_hook(gathered.leave, always_call=True).remove)
        yield


def _groups(model: PreTrainedModel) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield the modules to gather weights for, and these weights."""
    layers = [
        layer
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module.children()
    ]
    inside = {id(part) for layer in layers for part in layer.modules()}
    nested = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    for layer in layers:
        if id(layer) not in nested and (parameters := list(layer.parameters())):
            yield layer, parameters
    for module in model.modules():
        if id(module) not in inside and (parameters := list(module.parameters(recurse=False))):
            yield module, parameters


class _Gathered:
    """Hooks of a module that gather its weights before it runs and partition them again afterwards."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._stack: Any = None

    def enter(self, *_: Any) -> None:
        from deepspeed import zero  # slow to import, and needed only here

        self._stack = ExitStack()
        self._stack.enter_context(zero.GatheredParameters(self._parameters))

    def leave(self, *_: Any) -> None:
        self._stack.close()
