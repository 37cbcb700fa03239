"""Planned memory of the fused head, compared with peaks of the allocator and of whole processes."""

from dataclasses import replace

import pytest
import torch

from dft import linear_dft_loss
from dft.loss import tiles
from dft.loss.head_memory import HeadShape, peak_head_bytes

MIB = 2**20


def allocated_peak(run):
    """Return the peak of the bytes that torch allocated on the CPU during `run`."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("trains_weight", [True, False])
@pytest.mark.parametrize("tokens", [30, 100, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_planned_memory_is_close_to_what_the_head_allocates(monkeypatch, dtype, tokens, trains_weight):
    """With one tile, one group of tiles, and several groups."""
    vocab, width, constant = 4096, 128, 128 * 1024
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * vocab * 80)
    for module in ("dft.loss.rows.CACHED_BYTES", "dft.loss.products.BLOCK_BYTES"):
        monkeypatch.setattr(module, constant)
    hidden = torch.randn(1, tokens + 1, width, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, width) / 10).to(dtype).requires_grad_(trains_weight)
    labels = torch.randint(vocab, (1, tokens + 1))
    peak = allocated_peak(lambda: linear_dft_loss(hidden, weight, labels)[0].backward())
    planned = peak_head_bytes(HeadShape(tokens, vocab, width, dtype, dtype, trains_weight, "cpu"))
    rows = 4 * tokens * width * dtype.itemsize  # hidden states and their gradients, not included in the plan
    assert planned == pytest.approx(peak, abs=rows + 3 * constant, rel=0)


@pytest.mark.parametrize(
    ("tokens", "vocab", "width", "measured_mib"),
    [(512, 151_936, 896, (836, 514)), (614, 151_936, 896, (896, 558)), (2048, 32_768, 2048, (561, 387))],
)
def test_planned_memory_is_close_to_peaks_of_the_benchmark(tokens, vocab, width, measured_mib):
    """MiB of whole processes in docs/benchmarks.md, with hidden states and constant blocks of 16 MiB."""
    for dtype, measured in zip((torch.float32, torch.bfloat16), measured_mib, strict=True):
        planned = peak_head_bytes(HeadShape(tokens, vocab, width, dtype, dtype, True, "cpu"))
        rows = 3 * tokens * width * dtype.itemsize
        assert (planned + rows) / MIB + 16 == pytest.approx(measured, rel=0.04)


def test_on_a_gpu_the_memory_of_a_tile_is_used_again_for_the_sum():
    vocab, width = 151_936, 896
    shape = HeadShape(10_000, vocab, width, torch.bfloat16, torch.bfloat16, True, "cuda")
    tile, group = 4 * vocab * 1667, 2 * vocab * 6668  # 6 tiles of at most 1 GiB, 4 of them per group of 2 GiB
    assert peak_head_bytes(shape) == tile + group + 4 * vocab * width
    one_group = replace(shape, tokens=6000)
    assert peak_head_bytes(one_group) == 4 * vocab * 1500 + 2 * vocab * 6000
    assert peak_head_bytes(replace(one_group, tokens=100)) == 2 * vocab * (100 + width)
