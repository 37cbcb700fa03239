"""Numbers that are read from a device while it continues to compute."""

import torch
from torch import Tensor

DEVICE_TYPES = frozenset({"cuda"})
"""Types of devices that compute while the host continues, so that reading a number waits for them."""


class HostCopy:
    """A number on a device that is copied to the host while the device continues.

    Args:
        number: float32 scalar.
    """

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if number.is_cuda:
            self._copy = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._copy.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()
        else:
            self._copy = number.clone()

    def read(self) -> float:
        """Return the number. Waits until the device has computed it, but not for later work."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._copy.numpy())
