"""About how much memory a device needs before the first activation, known from sizes alone."""

import math
from dataclasses import astuple, dataclass

import torch
import transformers
from torch import nn

from dft.arguments.deepspeed_file import zero_of
from dft.loss.tiles import GROUP_BYTES, TILE_BYTES
from dft.ranks import world_size
from dft.training.parameters import GIB, element_count


@dataclass(frozen=True)
class MemoryLayout:
    """How weights, gradients and the optimizer's state lie on the devices.

    Attributes:
        ranks: that share them.
        stage: of ZeRO; 0 without DeepSpeed.
        optimizer_away, weights_away: whether they are offloaded.
        itemsize: bytes of a weight.
        device: cuda, or another.
    """

    ranks: int
    stage: int
    optimizer_away: bool
    weights_away: bool
    itemsize: int
    device: str = "cpu"


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB per device.

    Attributes:
        weights, gradients: of the model.
        optimizer: the two moments of AdamW, and the master weights that DeepSpeed keeps in float32; None for
            other optimizers, whose state is not known here.
        head: the gradient of the output embedding in float32, one tile of logits, and in half precision on a
            GPU the gradient of some.
    """

    weights: float
    gradients: float
    optimizer: float | None
    head: float

    def __str__(self) -> str:
        total = self.weights + self.gradients + (self.optimizer or 0) + self.head
        state = (
            "optimizer not counted" if self.optimizer is None else f"optimizer {format_gib(self.optimizer)}"
        )
        return (
            f"about {format_gib(total)} per device before activations: weights {format_gib(self.weights)}, "
            f"gradients {format_gib(self.gradients)}, {state}, loss {format_gib(self.head)}"
        )


def format_gib(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def estimate_memory(
    model: nn.Module,
    training: transformers.TrainingArguments,
    tokens: int,
    layout: MemoryLayout | None = None,
    share: float = 1.0,
) -> MemoryEstimate:
    """What ZeRO and FSDP shard is divided by the ranks, what is offloaded to the CPU is not counted.

    Args:
        tokens: of a micro-batch, at most.
        layout: other than that of the run.
        share: of the tokens that is supervised, and reaches the head.
    """
    layout = layout or resolve_layout(model, training)
    ranks, stage, optimizer_away, weights_away, itemsize, device = astuple(layout)
    trained = sum(element_count(one) for one in model.parameters() if one.requires_grad)
    head = model.get_output_embeddings()
    vocab = model.config.get_text_config().vocab_size
    entries = vocab * math.ceil(tokens * share)  # of the logits
    most = TILE_BYTES["cuda" if device == "cuda" else "cpu"]
    tile, at_once = min(most, 4 * entries), 4 * entries <= most
    if device == "cuda" and (itemsize == 2 or training.mixed_precision != "no"):
        tile += min(GROUP_BYTES, 2 * entries)
        at_once = 2 * entries <= GROUP_BYTES
    shared = [ranks if training.fsdp or stage >= least else 1 for least in (3, 2, 1)]
    held = sum(element_count(one) * bytes_of(one, itemsize) for one in model.parameters())
    weights = 0 if weights_away else held / shared[0]
    # DDP keeps its buckets beside the gradients.
    copies = 2 if ranks > 1 and not stage and not training.fsdp else 1
    gradients = 0 if optimizer_away else copies * trained * gradient_size(training, itemsize) / shared[1]
    state = None
    if training.optim.value.startswith("adamw") and "8bit" not in training.optim.value:
        bytes_each = 12 if stage else 2 * itemsize
        state = 0 if optimizer_away else trained * bytes_each / shared[2] / GIB
    in_head = 0
    if head is not None and head.weight.requires_grad and not (at_once and itemsize == 2):
        in_head = 4 * element_count(head.weight)  # else nothing is summed: it is the gradient that is counted
    return MemoryEstimate(weights / GIB, gradients / GIB, state, (in_head + tile) / GIB)


def resolve_layout(model: nn.Module, training: transformers.TrainingArguments) -> MemoryLayout:
    """That of a run."""
    stage, optimizer_away, weights_away = zero_of(training)
    itemsize = model.dtype.itemsize
    if stage and (training.bf16 or training.fp16):
        itemsize = 2
    elif training.fsdp and training.mixed_precision != "no":
        itemsize = 4  # accelerate raises what is trained, and casts a layer at a time
    return MemoryLayout(world_size(), stage, optimizer_away, weights_away, itemsize, training.device.type)


def bytes_of(parameter: nn.Parameter, itemsize: int) -> float:
    """Bytes of an element: frozen weights stay as they were loaded, unless all are cast to less."""
    if parameter.dtype == torch.uint8:
        return 1 + 1 / 32  # bitsandbytes keeps a scale of 8 bits for every 64 weights
    return itemsize if parameter.requires_grad else min(itemsize, parameter.element_size())


def has_4bit_weights(model: nn.Module) -> bool:
    """Whether weights are packed, two in a byte."""
    return any(one.dtype == torch.uint8 for one in model.parameters())


def autocasts(model: nn.Module, training: transformers.TrainingArguments, layout: MemoryLayout) -> bool:
    """Whether float32 weights are cast as they are used. ZeRO and FSDP compute on weights cast before."""
    mixed = training.mixed_precision != "no" and model.dtype.itemsize == 4
    return mixed and not layout.stage and not training.fsdp


def gradient_size(training: transformers.TrainingArguments, itemsize: int) -> int:
    """Bytes of one element of the gradient, which DeepSpeed may sum wider than the weights are."""
    if not training.deepspeed:
        return itemsize
    wanted = training.hf_deepspeed_config.get_value("data_types.grad_accum_dtype")
    return {"fp32": 4, "fp16": 2, "bf16": 2}.get(wanted, itemsize)


def estimate_activations(
    model: nn.Module,
    training: transformers.TrainingArguments,
    rows: int,
    tokens: int,
    checkpointed: bool | None = None,
    layout: MemoryLayout | None = None,
) -> float:
    """About how many GiB of activations a micro-batch keeps for the backward pass, without the head.

    After Korthikanti et al. (arXiv 2205.05198, section 4), counted for a gated MLP: ten times the width and
    five times that of the MLP, per layer and token. Measured on GPUs it was within a fifth of that. With
    checkpointing what enters each layer is kept, and one layer is computed again.

    Args:
        rows, tokens: of the micro-batch; all rows together have so many tokens.
        checkpointed, layout: other than the run has it.
    """
    config = model.config.get_text_config()
    given = config.to_dict()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = given.get("intermediate_size") or 4 * width
    itemsize = 2 if training.mixed_precision != "no" else model.dtype.itemsize
    layer = tokens * (10 * width + 5 * inner)
    if autocasts(model, training, layout or resolve_layout(model, training)):
        # Two sums and two norms are kept in float32, and the norms once more as they are cast.
        layer += tokens * 6 * width
    if config._attn_implementation == "eager":  # which holds the scores, and their softmax
        layer += 2 * given.get("num_attention_heads", 1) * tokens * tokens / max(1, rows)
    if training.gradient_checkpointing if checkpointed is None else checkpointed:
        return itemsize * (layers * tokens * width + layer) / GIB
    return itemsize * layers * layer / GIB


def estimate_logits(model: nn.Module, training: transformers.TrainingArguments, tokens: int) -> float:
    """GiB of a micro-batch's logits where they are held: as the model gives them and in float32, and the
    gradient of both."""
    vocab = model.config.get_text_config().vocab_size
    itemsize = 2 if training.mixed_precision != "no" else model.dtype.itemsize
    return tokens * vocab * 2 * (itemsize + 4) / GIB
