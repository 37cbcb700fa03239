"""How fast a run is, of what its device could do, and how much memory it takes."""

import re
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dft.training.parameters import GIB, element_count, element_dims

PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "GH200": 989,
    "H20": 148, "A100": 312, "A800": 312, "H800": 989, "L40S": 362, "L40": 181, "L4": 121, "A40": 150,
    "A30": 165, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "RTX 5090": 209, "MI300X": 1307,
    "MI325X": 1307, "MI250X": 191, "RTX 6000 Ada": 364, "RTX A6000": 155, "V100": 125,
}  # fmt: skip
"""Dense products in half precision that sum in float32, 1e12 operations a second, from the makers' data
sheets (without sparsity; of an MI250X one of its two dies, which is one device). The longest name whose words
are among those of the device counts."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a training step that the mathematics asks for; recomputing is not counted.

    After PaLM (Chowdhery et al., arXiv 2204.02311, appendix B): two operations per weight and token forward,
    two for the gradient on its input, two for that on the weight if it is trained. Other than there,
    attention counts the pairs that a causal mask leaves, and the output embedding supervised tokens alone.

    Attributes:
        per_token: of the layers' weights.
        per_pair: of attention, for each pair of tokens of which one attends to the other.
        per_supervised: of the output embedding.
    """

    per_token: float
    per_pair: float
    per_supervised: float

    def total(self, tokens: float, pairs: float, supervised: float) -> float:
        return self.per_token * tokens + self.per_pair * pairs + self.per_supervised * supervised


def model_flops(model: nn.Module) -> ModelFlops | None:
    """What a step of a model costs; None for a mixture of experts that does not say how many are active."""
    config: PretrainedConfig = model.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.add(id(head.weight))
    active = active_expert_fraction(config)
    layers = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings or element_dims(parameter) < 2:
            continue
        if ".experts." in name:
            if active is None:
                return None
            layers += active * cost(parameter)
        else:
            layers += cost(parameter)
    given = config.to_dict()
    heads, width = given.get("num_attention_heads"), given.get("hidden_size")
    pair = 0.0
    if heads and width:
        inner = heads * (given.get("head_dim") or width // heads)
        pair = 3 * 2 * 2 * inner * config.num_hidden_layers  # scores and values; forward, and twice backward
    return ModelFlops(layers, pair, 0.0 if head is None else cost(head.weight))


def cost(parameter: nn.Parameter) -> float:
    """Operations per token: of forward, the gradient on the input, and that on the weight."""
    return (6 if parameter.requires_grad else 4) * element_count(parameter)


def active_expert_fraction(config: PretrainedConfig) -> float | None:
    """Of a mixture of experts, how many work on one token."""
    given = config.to_dict()
    total = next(
        (given[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if given.get(name)),
        None,
    )
    chosen = given.get("num_experts_per_tok")
    return chosen / total if total and chosen else None


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device can do in half precision; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name:
        return None  # slower than the card of the same name, each by its cooling
    known = max((one for one in PEAK_TFLOPS if re.search(rf"\b{one}\b", name)), key=len, default=None)
    return None if known is None else PEAK_TFLOPS[known] * 1e12


class Clock:
    """Seconds of training steps, without evaluating and saving, and seconds that are left, with them."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Training goes on from a step."""
        self._began = self._window = time.perf_counter()
        self._first = self._step = step

    def exclude_time(self, seconds: float) -> None:
        """What just took place does not count."""
        self._window += seconds
        if self._step == self._first:
            self._began += seconds  # of the untouched model; that does not come again

    def window_seconds(self, step: int) -> float:
        """Seconds since this was last asked."""
        now = time.perf_counter()
        seconds, self._window, self._step = now - self._window, now, step
        return seconds

    def seconds_left(self, last: int) -> float:
        """Until a step, at the pace of this run so far, with all that it does between steps."""
        done = self._step - self._first
        return (time.perf_counter() - self._began) / max(done, 1) * (last - self._step)


def peak_memory(device: torch.device) -> float:
    """GiB that this process held at most: of the device's memory, on a CPU of the machine's."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return torch.accelerator.max_memory_allocated(device) / GIB
