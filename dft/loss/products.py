"""Matrix products of the fused head: float32 results from factors of any dtype."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20
"""Bytes of a half-precision weight converted to float32 at a time, on devices without mixed products. They
fit the cache of a CPU."""


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which the products are computed.

    Under autocast on a CPU this is the dtype of the weight: logits are float32 there in any case, so a
    half-precision copy of the weight would only add overhead.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and device != "cpu":
        return torch.get_autocast_dtype(device)
    return weight.dtype


def wide_product(rows: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """Compute rows @ weight.T, (rows, vocab), accumulated and returned in float32 or wider.

    A product rounded to bfloat16 has an error of 0.06 at logits of about 20, which would directly affect the
    probability and therefore the weight of the token.

    Args:
        buffer: (at least rows, vocab), for the result; required on a CPU.
    """
    if rows.dtype.itemsize < 4 and rows.device.type == "cuda":
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    out = None if buffer is None else buffer[: len(rows)]
    if rows.dtype.itemsize >= 4:
        return torch.mm(rows, weight.t(), out=out)
    assert out is not None
    # torch has no product of half-precision factors with a float32 result on a CPU.
    with bfloat16_factors(rows.dtype == torch.bfloat16):
        rows = rows.float()
        for start, block in wide_blocks(weight):
            torch.mm(rows, block.t(), out=out[:, start : start + len(block)])
    return out


@contextmanager
def bfloat16_factors(enabled: bool) -> Iterator[None]:
    """Let oneDNN compute float32 products on a CPU, whose factors it may round to bfloat16.

    Exact for factors that are bfloat16 values. oneDNN multiplies them at the rate of bfloat16 where the
    processor has AMX, and elsewhere in float32 with its own kernels, which are faster than MKL's on AMD
    processors. Has no effect on processors without bfloat16 instructions.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch replaces the module
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute out = gradient @ weight, (rows, hidden), in the dtype of `out`."""
    if out.dtype == weight.dtype:
        torch.mm(gradient.to(weight.dtype), weight, out=out)
    elif out.device.type == "cuda":
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for start, block in wide_blocks(weight):
            out.addmm_(gradient[:, start : start + len(block)], block)


def wide_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, block) of a half-precision weight in float32; all blocks share the same memory."""
    vocab, width = weight.shape
    step = min(max(1, BLOCK_BYTES // (4 * width)), vocab)
    buffer = weight.new_empty(step, width, dtype=torch.float32)
    for start in range(0, vocab, step):
        part = weight[start : start + step]
        yield start, buffer[: len(part)].copy_(part)


def accumulated(total: Tensor | None, gradient: Tensor, rows: Tensor, only: bool) -> Tensor:
    """Compute total + gradient.T @ rows, (vocab, hidden), accumulated in float32 or wider.

    Args:
        total: the sum so far, overwritten; None for 0.
        only: whether this is the only term and the result is needed in bfloat16; it then stays in bfloat16.
    """
    on_gpu = rows.device.type == "cuda" and rows.dtype.itemsize < 4
    if gradient.dtype == torch.bfloat16 and (only or not on_gpu):
        part = torch.mm(gradient.t(), rows)  # summed in float32, then rounded
        if total is None:
            return part if only else part.float()
        for start, block in wide_blocks(part):
            total[start : start + len(block)] += block
        return total
    if total is None:
        if on_gpu:
            return torch.mm(gradient.t(), rows, out_dtype=torch.float32)
        return torch.mm(gradient.t(), rows.to(gradient.dtype))
    if on_gpu:
        # Older versions of torch do not support a sum wider than the factors.
        return torch.addmm(total, gradient.t(), rows, out_dtype=torch.float32, out=total)
    return total.addmm_(gradient.t(), rows.to(gradient.dtype))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor in `dtype`.

    If the gradient already has that dtype, it is scaled in place, or left unchanged if the factor is 1.
    """
    on_cpu = gradient.device.type == "cpu"
    if on_cpu and factor.item() == 1:
        return gradient.to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if on_cpu or gradient.dtype == torch.float64:
        return gradient.mul_(factor)
    from dft.loss.kernels import scale_  # triton comes with CUDA builds of torch

    return scale_(gradient, factor)
