"""Sums with float64 accuracy, even on devices without float64."""

import torch
from torch import Tensor

DEVICES_WITHOUT_FLOAT64 = ("mps",)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device: float64, or float32 where it has no float64."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


class Accumulator:
    """A vector of running sums on a device.

    A logging window may hold billions of tokens, and a plain float32 count stops growing at 2**24. Sums are
    therefore float64. On a device without float64, each sum is a pair of float32 numbers: its rounded value,
    and the rounding error of that value. Adding to the pair (Knuth's TwoSum, followed by a renormalization)
    keeps about 46 bits. No operation synchronizes with the device.

    Args:
        size: number of sums.
        device: device of the sums.
        dtype: float64 or float32; default: `accumulation_dtype(device)`.

    Attributes:
        state: (1, size) float64, or (2, size) float32: values, then rounding errors. Copying it saves the
            sums, and copying it back restores them.
    """

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or accumulation_dtype(device)
        parts = 1 if self.dtype == torch.float64 else 2
        self.state = torch.zeros(parts, size, dtype=self.dtype, device=device)

    def add(self, terms: Tensor) -> None:
        """Add one term to each sum.

        Args:
            terms: (size,) on the device.
        """
        terms = terms.to(self.dtype)
        if self.dtype == torch.float64:
            self.state[0] += terms
            return
        value, error = self.state
        total = value + terms
        term_part = total - value
        error = error + ((value - (total - term_part)) + (terms - term_part))
        rounded = total + error
        # Infinity minus infinity would turn an infinite sum into NaN.
        self.state[1] = torch.where(rounded.isfinite(), error - (rounded - total), 0.0)
        self.state[0] = torch.where(total.isfinite(), rounded, total)

    def total(self) -> Tensor:
        """Return the sums, (size,) float64: on the device, or on the CPU if the device has no float64."""
        if self.dtype == torch.float64:
            return self.state[0].clone()
        return self.state.cpu().double().sum(0)

    def add_total(self, total: Tensor) -> None:
        """Add sums that `total` returned.

        Args:
            total: (size,) float64, on the CPU.
        """
        coarse = total.to(self.dtype)
        self.add(coarse.to(self.state.device))
        if self.dtype != torch.float64:
            rest = torch.where(coarse.isfinite(), total - coarse.double(), 0.0)
            self.add(rest.to(self.dtype).to(self.state.device))

    def reset(self) -> None:
        """Set all sums to zero."""
        self.state.zero_()
