"""Throughput of a run, its share of the device's peak, and its memory use."""

import re
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dft.training.parameters import GIB, element_count, element_dims

PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "GH200": 989,
    "H20": 148, "A100": 312, "A800": 312, "H800": 989, "L40S": 362, "L40": 181, "L4": 121, "A40": 150,
    "A30": 165, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "RTX 5090": 209, "MI300X": 1307,
    "MI325X": 1307, "MI250X": 191, "RTX 6000 Ada": 364, "RTX A6000": 155, "V100": 125,
}  # fmt: skip
"""Peak of dense half-precision matrix products with float32 sums, in 1e12 operations per second.

From the data sheets of the manufacturers, without sparsity; for the MI250X, of one of its two dies, each of
which is a device. The longest name whose words are in the device name applies.
"""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a training step; recomputation is not counted.

    Follows PaLM (Chowdhery et al., arXiv 2204.02311, appendix B): per weight and token, two operations in the
    forward pass, two for the gradient of the input and, if the weight is trained, two for its own gradient.
    Unlike PaLM, counts only causal pairs in attention and only supervised tokens in the output embedding.

    Attributes:
        per_token: operations of the layers per token.
        per_pair: operations of attention per (token, attended token) pair.
        per_supervised: operations of the output embedding per supervised token.
    """

    per_token: float
    per_pair: float
    per_supervised: float

    def total(self, tokens: float, pairs: float, supervised: float) -> float:
        """Return the number of operations for the given numbers of tokens, pairs and supervised tokens."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_supervised * supervised


def model_flops(model: PreTrainedModel, forward_only: bool = False) -> ModelFlops | None:
    """Return the operation counts of a model; None if its number of active experts is unknown.

    Args:
        model: the model, possibly on the meta device.
        forward_only: count the forward pass alone instead of a training step.
    """
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
            layers += active * flops_per_token(parameter, forward_only)
        else:
            layers += flops_per_token(parameter, forward_only)
    settings = config.to_dict()
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    pair = 0.0
    if heads and width:
        attention_width = heads * (settings.get("head_dim") or width // heads)
        # Scores and values, two operations each; once in the forward pass, twice in the backward pass.
        pair = (1 if forward_only else 3) * 2 * 2 * attention_width * config.num_hidden_layers
    return ModelFlops(layers, pair, 0.0 if head is None else flops_per_token(head.weight, forward_only))


def flops_per_token(weight: nn.Parameter, forward_only: bool = False) -> float:
    """Return the operations per token of the products with a weight, forward and backward."""
    if forward_only:
        return 2 * element_count(weight)
    return (6 if weight.requires_grad else 4) * element_count(weight)


def active_expert_fraction(config: PretrainedConfig) -> float | None:
    """Return the fraction of experts that each token uses; None if the configuration does not specify it."""
    settings = config.to_dict()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((settings[name] for name in names if settings.get(name)), None)
    active = settings.get("num_experts_per_tok")
    return active / total if total and active else None


def peak_flops(device: torch.device) -> float | None:
    """Return the peak operations per second of a device in half precision; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name:
        return None  # slower than the desktop card of the same name, depending on cooling
    matches = (card for card in PEAK_TFLOPS if re.search(rf"\b{card}\b", name))
    card = max(matches, key=len, default=None)
    return None if card is None else PEAK_TFLOPS[card] * 1e12


class Clock:
    """Measures the time of training steps without evaluation and saving, and estimates the time left."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Start the clock at the optimizer step at which training begins or resumes."""
        self._run_start = self._window_start = time.perf_counter()
        self._first_step = self._step = step

    def exclude_time(self, seconds: float) -> None:
        """Exclude `seconds` from the throughput clock (evaluation, saving)."""
        self._window_start += seconds
        if self._step == self._first_step:
            # An evaluation before the first step does not recur, so it is excluded from the time left.
            self._run_start += seconds

    def window_seconds(self, step: int) -> float:
        """Return the seconds since the last call, without excluded time.

        Args:
            step: number of completed optimizer steps.
        """
        now = time.perf_counter()
        seconds, self._window_start, self._step = now - self._window_start, now, step
        return seconds

    def seconds_left(self, last_step: int) -> float:
        """Return the seconds until a step at this run's average pace, including evaluation and saving."""
        done = self._step - self._first_step
        return (time.perf_counter() - self._run_start) / max(done, 1) * (last_step - self._step)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory use of this process in GiB: device memory or, on a CPU, main memory.

    MPS does not record a peak; the currently allocated memory is returned instead.
    """
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    return torch.accelerator.max_memory_allocated(device) / GIB
