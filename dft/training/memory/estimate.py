"""Estimate a device's memory use from the sizes of the model and the batch."""

import math
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from dft.arguments.deepspeed_file import zero_of
from dft.arguments.training import OwnOptimizer
from dft.loss.head_memory import HeadShape, peak_head_bytes
from dft.ranks import world_size
from dft.training.memory.experts import active_mlp
from dft.training.muon import split_weights
from dft.training.parameters import GIB, element_count


@dataclass(frozen=True)
class MemoryLayout:
    """Distribution of weights, gradients and optimizer state over the devices.

    Attributes:
        ranks: number of ranks that share them.
        stage: ZeRO stage; 0 without DeepSpeed.
        optimizer_offloaded, weights_offloaded: whether they are kept in CPU memory.
        itemsize: number of bytes per weight.
        device: device type, "cuda" or another.
    """

    ranks: int
    stage: int
    optimizer_offloaded: bool
    weights_offloaded: bool
    itemsize: int
    device: str = "cpu"


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a device before the first activation, in GiB.

    Attributes:
        weights, gradients: those of the model.
        optimizer: the two moments of AdamW, of which Muon has one for its matrices, and the float32 master
            weights of DeepSpeed; None for other optimizers, whose state is not estimated.
        head: one tile of logits, in half precision the gradient of a group of tiles, and the gradient of the
            output embedding while it is summed (`dft.loss.head_memory`).
        average: the average of the trained weights, if there is one.
    """

    weights: float
    gradients: float
    optimizer: float | None
    head: float
    average: float = 0.0

    def __str__(self) -> str:
        total = self.weights + self.gradients + (self.optimizer or 0) + self.head + self.average
        state = "not counted" if self.optimizer is None else format_gib(self.optimizer)
        return (
            f"about {format_gib(total)} per device before activations: weights {format_gib(self.weights)}, "
            f"gradients {format_gib(self.gradients)}, optimizer {state}, loss {format_gib(self.head)}"
            f"{f', average {format_gib(self.average)}' if self.average else ''}"
        )


def format_gib(gib: float) -> str:
    """Format a size in GiB for reports, using MiB below 1 GiB."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def estimate_memory(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    tokens: int,
    layout: MemoryLayout | None = None,
    supervised_share: float = 1.0,
) -> MemoryEstimate:
    """Estimate the memory of a device before the first activation.

    Sizes that ZeRO and FSDP shard are divided by the number of ranks. Memory offloaded to the CPU is not
    counted.

    Args:
        model: the model, possibly on the meta device.
        training: arguments of the run.
        tokens: maximum number of tokens of a micro-batch.
        layout: distribution over the devices; default: that of the run.
        supervised_share: share of the tokens that are supervised and reach the head.
    """
    layout = layout or resolve_layout(model, training)
    sharded_ranks = [
        layout.ranks if training.fsdp or layout.stage >= stage else 1
        for stage in (3, 2, 1)  # ZeRO stages from which weights, gradients and optimizer state are sharded
    ]
    trained = sum(element_count(parameter) for parameter in model.parameters() if parameter.requires_grad)
    trained_itemsize = _trained_itemsize(model, training, layout)
    weights = 0.0
    if not layout.weights_offloaded:
        sizes = (
            element_count(parameter)
            * (trained_itemsize if parameter.requires_grad else bytes_per_frozen_element(parameter, layout))
            for parameter in model.parameters()
        )
        weights = sum(sizes) / sharded_ranks[0]
    # DDP keeps its buckets in addition to the gradients.
    copies = 2 if layout.ranks > 1 and not layout.stage and not training.fsdp else 1
    gradients = 0.0
    if not layout.optimizer_offloaded:
        gradients = copies * trained * gradient_itemsize(training, trained_itemsize) / sharded_ranks[1]
    optimizer: float | None = None
    if training.optim == OwnOptimizer.MUON:  # never sharded
        matrices, *others = (sum(map(element_count, weights)) for weights in split_weights(model))
        optimizer = (matrices + 2 * sum(others)) * trained_itemsize / GIB
    elif training.optim.value.startswith("adamw") and "8bit" not in training.optim.value:
        bytes_each = 12 if layout.stage else 2 * trained_itemsize
        optimizer = 0.0 if layout.optimizer_offloaded else trained * bytes_each / sharded_ranks[2] / GIB
    head = _head_bytes(model, training, math.ceil(tokens * supervised_share), layout)
    average = 4 * trained / sharded_ranks[2] if averages_weights(training) else 0.0
    return MemoryEstimate(weights / GIB, gradients / GIB, optimizer, head / GIB, average / GIB)


def averages_weights(training: transformers.TrainingArguments) -> bool:
    """Return whether the run keeps a float32 average of the trained weights."""
    return vars(training).get("ema_decay") is not None


def _head_bytes(
    model: PreTrainedModel, training: transformers.TrainingArguments, tokens: int, layout: MemoryLayout
) -> float:
    """Return the bytes that the fused loss needs for a number of supervised tokens."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    dtype = product_dtype(model, training, layout)
    weight_dtype = dtype
    if autocasts(model, training, layout):
        weight_dtype = model.dtype
    trains_weight = head is not None and head.weight.requires_grad
    width = config.hidden_size
    if head is not None and trains_weight:
        width = element_count(head.weight) // config.vocab_size
    shape = HeadShape(tokens, config.vocab_size, width, dtype, weight_dtype, trains_weight, layout.device)
    return peak_head_bytes(shape)


def product_dtype(
    model: PreTrainedModel, training: transformers.TrainingArguments, layout: MemoryLayout
) -> torch.dtype:
    """Return the dtype of the products of the fused head, see `dft.loss.products.product_dtype`."""
    is_mixed = training.mixed_precision != "no"
    casts_on_use = autocasts(model, training, layout)
    if layout.itemsize != 2 and (not is_mixed or (casts_on_use and layout.device == "cpu")):
        return model.dtype
    if is_mixed:
        return torch.float16 if training.mixed_precision == "fp16" else torch.bfloat16
    return model.dtype if model.dtype.itemsize == 2 else torch.bfloat16


def resolve_layout(model: PreTrainedModel, training: transformers.TrainingArguments) -> MemoryLayout:
    """Return the memory layout of a run."""
    stage, optimizer_offloaded, weights_offloaded = zero_of(training)
    itemsize = model.dtype.itemsize
    if stage and (training.bf16 or training.fp16):
        itemsize = 2
    elif training.fsdp and training.mixed_precision != "no":
        itemsize = 4  # accelerate converts trained weights to float32 and casts one layer at a time
    return MemoryLayout(
        world_size(), stage, optimizer_offloaded, weights_offloaded, itemsize, training.device.type
    )


def bytes_per_frozen_element(parameter: nn.Parameter, layout: MemoryLayout) -> float:
    """Return the number of bytes per element of a frozen weight.

    It keeps its dtype, unless all weights are cast to a smaller one.
    """
    if parameter.dtype == torch.uint8:
        return 1 + 1 / 32  # bitsandbytes keeps an 8-bit scale for every 64 weights
    return min(layout.itemsize, parameter.element_size())


def _trained_itemsize(
    model: PreTrainedModel, training: transformers.TrainingArguments, layout: MemoryLayout
) -> float:
    """Return the mean number of bytes per element of the trained weights.

    ZeRO and FSDP cast them. Otherwise they keep their dtype. For adapters it is float32 whatever the dtype of
    the model, and embeddings that are trained with them keep that of the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if layout.stage or training.fsdp or not trained:
        return layout.itemsize
    size = sum(element_count(parameter) * parameter.element_size() for parameter in trained)
    return size / sum(map(element_count, trained))


def has_4bit_weights(model: PreTrainedModel) -> bool:
    """Return whether weights are packed, two per byte."""
    return any(parameter.dtype == torch.uint8 for parameter in model.parameters())


def autocasts(model: PreTrainedModel, training: transformers.TrainingArguments, layout: MemoryLayout) -> bool:
    """Return whether float32 weights are cast on use. ZeRO and FSDP cast them in advance."""
    is_mixed = training.mixed_precision != "no" and model.dtype.itemsize == 4
    return is_mixed and not layout.stage and not training.fsdp


def gradient_itemsize(training: transformers.TrainingArguments, itemsize: float) -> float:
    """Return the number of bytes per element of the gradient, which DeepSpeed may sum in a wider dtype."""
    if not training.deepspeed:
        return itemsize
    dtype = training.hf_deepspeed_config.get_value("data_types.grad_accum_dtype")
    return {"fp32": 4, "fp16": 2, "bf16": 2}.get(dtype, itemsize)


def compute_itemsize(model: PreTrainedModel, training: transformers.TrainingArguments) -> int:
    """Return the number of bytes per element of an activation."""
    return 2 if training.mixed_precision != "no" else model.dtype.itemsize


def estimate_activations(
    model: PreTrainedModel,
    training: transformers.TrainingArguments,
    rows: int,
    tokens: int,
    checkpointed: bool | None = None,
    layout: MemoryLayout | None = None,
) -> float:
    """Estimate the activations that a micro-batch keeps for the backward pass, without the head, in GiB.

    Follows Korthikanti et al. (arXiv 2205.05198, section 4) with the numbers of a gated MLP: ten times the
    hidden size and five times the size of the MLP, per layer and token. Measurements on GPUs were within 20 %
    of it. A token that is sent to k experts keeps k times the size of an expert's MLP, and k times its input
    and output. With gradient checkpointing, the input of each layer is kept, and one layer is recomputed.

    Args:
        model: the model, possibly on the meta device.
        training: arguments of the run.
        rows: number of rows in the micro-batch.
        tokens: total number of tokens in all rows.
        checkpointed: whether activations are recomputed; default: as in the run.
        layout: distribution over the devices; default: that of the run.
    """
    config = model.config.get_text_config()
    settings = config.to_dict()
    width, layers = config.hidden_size, config.num_hidden_layers
    mlp_width, copies = active_mlp(model)
    layer = tokens * ((10 + 2 * copies) * width + 5 * mlp_width)
    if autocasts(model, training, layout or resolve_layout(model, training)):
        # Two sums and two norms are kept in float32, and the norms again after they are cast.
        layer += tokens * 6 * width
    if config._attn_implementation == "eager":  # eager attention keeps the scores and their softmax
        layer += 2 * settings.get("num_attention_heads", 1) * tokens * tokens / max(1, rows)
    itemsize = compute_itemsize(model, training)
    if training.gradient_checkpointing if checkpointed is None else checkpointed:
        return itemsize * (layers * tokens * width + layer) / GIB
    return itemsize * layers * layer / GIB


def estimate_logits(model: PreTrainedModel, training: transformers.TrainingArguments, tokens: int) -> float:
    """Estimate the logits of a micro-batch if the loss is not fused, in GiB.

    They exist in the dtype of the model and in float32, and so do their gradients.
    """
    vocab = model.config.get_text_config().vocab_size
    return tokens * vocab * 2 * (compute_itemsize(model, training) + 4) / GIB
