"""Compile the layers of a model one by one, with dynamic lengths."""

import transformers
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module, args: transformers.TrainingArguments, accelerator: Accelerator) -> None:
    """Compile the layers of a model, if `args.torch_compile` requests it.

    accelerate would compile the whole model, or take it apart to compile its regions, and would compile it
    again for batches of another length. Layers of the same class share their code: it is compiled once for
    training and once for evaluation. A model without such layers is left to accelerate.

    The layers are compiled in place and without their hooks, so that the wrappers of DDP, FSDP and DeepSpeed
    find the model as it is.

    Args:
        model: the model, before it is wrapped.
        args: the training arguments.
        accelerator: the run's accelerator, which then compiles nothing.
    """
    if not args.torch_compile:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        return
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
