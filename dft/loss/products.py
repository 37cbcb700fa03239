"""The matrix products of the fused head: float32 results of factors in whatever precision."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""What is converted at a time of a weight in half precision, where a product cannot give float32 itself."""


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """In which precision the products are computed.

    Under autocast on a CPU that of the weight: logits are float32 there at any rate, so a copy of the weight
    in half precision would cost time and bring nothing.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and device != "cpu":
        return torch.get_autocast_dtype(device)
    return weight.dtype


def wide_product(rows: Tensor, weight: Tensor, space: Tensor | None) -> Tensor:
    """rows @ weight.T, (rows, vocab), accumulated and given in float32 or wider.

    A product that is rounded to bfloat16 is off by 0.06 where logits are about 20, which would go straight
    into the probability and so into the weight of the token.
    """
    if rows.dtype.itemsize < 4 and rows.device.type == "cuda":
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    made = None if space is None else space[: len(rows)]
    if rows.dtype.itemsize >= 4:
        return torch.mm(rows, weight.t(), out=made)
    rows = rows.float()  # there is no such product on a CPU
    for start, part in wide_blocks(weight):
        torch.mm(rows, part.t(), out=made[:, start : start + len(part)])
    return made


def product(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = gradient @ weight, (rows, hidden), in the precision of `out`."""
    if out.dtype == weight.dtype:
        torch.mm(gradient.to(weight.dtype), weight, out=out)
    elif out.device.type == "cuda":
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for start, part in wide_blocks(weight):
            out.addmm_(gradient[:, start : start + len(part)], part)


def wide_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A weight in half precision as float32, block by block in the same memory, each with its first row."""
    vocab, width = weight.shape
    step = min(max(1, BLOCK_BYTES // (4 * width)), vocab)
    block = weight.new_empty(step, width, dtype=torch.float32)
    for start in range(0, vocab, step):
        part = weight[start : start + step]
        yield start, block[: len(part)].copy_(part)


def accumulated(total: Tensor | None, gradient: Tensor, rows: Tensor, only: bool) -> Tensor:
    """total + gradient.T @ rows, (vocab, hidden), summed in float32 or wider.

    `only`: nothing is to be added, and the sum is wanted in bfloat16: it need not be widened to be narrowed.
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
        options = {"out_dtype": torch.float32} if on_gpu else {}
        return torch.mm(gradient.t(), rows if on_gpu else rows.to(gradient.dtype), **options)
    if on_gpu:
        # A sum that is wider than the factors: older versions of torch refuse it.
        return torch.addmm(total, gradient.t(), rows, out_dtype=torch.float32, out=total)
    return total.addmm_(gradient.t(), rows.to(gradient.dtype))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in a dtype, in place where that is the same, and then not even read if it is 1."""
    on_cpu = gradient.device.type == "cpu"
    if on_cpu and factor.item() == 1:
        return gradient.to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if on_cpu or gradient.dtype == torch.float64:
        return gradient.mul_(factor)
    from dft.loss.kernels import scale_  # triton comes with CUDA builds of torch

    return scale_(gradient, factor)
