"""Size of the MLP that a token passes, which in a mixture of experts is that of several experts."""

import re
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
)  # fmt: skip
"""Settings in which models of transformers have the number of experts that a token is sent to."""


class ActiveMlp(NamedTuple):
    """What a token passes per layer, averaged over the layers.

    Attributes:
        width: size of the MLP, summed over the experts that the token is sent to.
        experts: number of these experts; 0 without a mixture of experts. Each has its own copy of the hidden
            state and its own output.
    """

    width: float
    experts: float


def active_mlp(model: PreTrainedModel) -> ActiveMlp:
    """Return the size of the MLP that a token passes.

    The weights of experts have three dimensions, one matrix per expert. The size of a gated MLP is a third of
    the number of its weights, divided by the hidden size.
    """
    config = model.config.get_text_config()
    settings = config.to_dict()
    layers = config.num_hidden_layers
    dense = settings.get("intermediate_size") or 4 * config.hidden_size
    if isinstance(dense, list):  # per layer
        dense = sum(dense) / len(dense)
    routed, shared, experts, sparse_layers = 0.0, 0, 0, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "shared" in name:
            shared += module.in_features * module.out_features
        if isinstance(module, nn.Conv1d):
            continue  # its weight has three dimensions too
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:
                count = _experts_per_token(settings, len(parameter))
                routed += parameter.numel() / len(parameter) * count
                experts = max(experts, count)
                sparse_layers.add(re.sub(r"(\.\d+)\..*", r"\1", name))
    if not sparse_layers:
        return ActiveMlp(dense, 0.0)
    sparse = (routed + shared) / (3 * config.hidden_size)
    dense_layers = max(0, layers - len(sparse_layers))
    return ActiveMlp((sparse + dense_layers * dense) / layers, experts * len(sparse_layers) / layers)


def _experts_per_token(settings: dict[str, Any], experts: int) -> int:
    """Return the number of experts that a token is sent to, or all where the settings do not say it."""
    for name in EXPERTS_PER_TOKEN:
        count = settings.get(name)
        if count:
            return max(count) if isinstance(count, list) else count
    return experts
