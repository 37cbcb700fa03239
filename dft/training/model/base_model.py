"""Frozen base model for objectives with a KL term."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dft.loss.head import run_base_model
from dft.loss.options import BaseHead


class FrozenBaseModel:
    """Untrained copy of the model. It is complete on each rank, even if the trained model is sharded.

    Args:
        model: model with the architecture and vocabulary of the trained one. Its parameters are frozen.
        device: device to move it to.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        # With a cache, transformers would treat the conversations of a packed row as a single sequence.
        self.model.config.get_text_config().use_cache = False

    def head_input(self, inputs: Mapping[str, Any]) -> BaseHead:
        """Return the input and weights of the base model's head, for the fused loss."""
        return run_base_model(self.model, inputs)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the base model's logits, (batch, seq, vocab)."""
        return self.model(**inputs).logits
