"""The frozen base model that an anchored objective holds the trained one against."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dft.loss.head import run_base_model
from dft.loss.options import BaseHead


class FrozenBaseModel:
    """A whole copy on each rank, whatever becomes of the model in training.

    Args:
        model: of the same architecture and vocabulary as the one that is trained. Its parameters are frozen.
        device: where it is put.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        # With a cache, transformers would take several conversations in a row for one.
        self.model.config.get_text_config().use_cache = False

    def head_input(self, inputs: Mapping[str, Any]) -> BaseHead:
        """Return the input and weights of the base model's head, for the fused loss."""
        return run_base_model(self.model, inputs)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the base model's logits, (batch, seq, vocab)."""
        return self.model(**inputs).logits
