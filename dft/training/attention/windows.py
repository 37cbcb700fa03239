"""Find sliding windows that a model implements by its mask alone, which `varlen` attention does not build."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dft.training.attention.interface import VARLEN, layer_types


@dataclass
class Windows:
    """Sliding windows of a forward pass with `varlen` attention.

    Attributes:
        masks: the windows of the masks that the model requested.
        layers: what the layers passed to the attention function: a window, or None for none.
    """

    masks: set[int] = field(default_factory=set)
    layers: set[int | None] = field(default_factory=set)

    def missing(self, config: PretrainedConfig) -> set[int]:
        """Return the windows that layers of the model have and do not pass to the attention function.

        Args:
            config: configuration of the text model.
        """
        types = layer_types(config)
        if not self.layers or (types and "sliding_attention" not in types):
            return set()  # attention is replaced (Ulysses), or no layer uses the mask
        return self.masks - self.layers


@contextmanager
def record_windows() -> Iterator[Windows]:
    """Record the windows of the forward passes with `varlen` attention in this context."""
    windows = Windows()
    attention, mask = ALL_ATTENTION_FUNCTIONS[VARLEN], ALL_MASK_ATTENTION_FUNCTIONS[VARLEN]

    def recording_attention(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        windows.layers.add(sliding_window)
        return attention(*args, sliding_window=sliding_window, **kwargs)

    def recording_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        if local_size:
            windows.masks.add(local_size)
        return mask(*args, local_size=local_size, **kwargs)

    AttentionInterface.register(VARLEN, recording_attention)
    AttentionMaskInterface.register(VARLEN, recording_mask)
    try:
        yield windows
    finally:
        AttentionInterface.register(VARLEN, attention)
        AttentionMaskInterface.register(VARLEN, mask)
