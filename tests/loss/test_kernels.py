"""The Triton kernels, interpreted on the CPU, against plain torch in float64; compilation for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dft.loss.objectives import Dft, make_objective
from dft.loss.rows import NO_WEIGHTS, RowOptions, RowWeights, score_rows_torch

pytest.importorskip("triton")  # no build for some platforms
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs the kernel itself"),
]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def kernels():
    from dft.loss import kernels  # tests/conftest.py sets TRITON_INTERPRET

    return kernels


SHAPES = [
    RowOptions(Dft(1.0)),
    RowOptions(Dft(0.0)),
    RowOptions(Dft(0.3), 0.25),
    RowOptions(Dft(1.0), 1.0, 30.0),
    RowOptions(Dft(0.7), 2.0, 5.0),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [1, 2, 37, 128, 300])
def test_statistics_and_gradient_match_float64(kernels, monkeypatch, vocab, shape):
    monkeypatch.setattr(kernels, "BLOCK", 128)  # several blocks, the last one partial
    generator = torch.Generator().manual_seed(vocab)
    tile = 8 * torch.randn(6, vocab, generator=generator)
    targets = torch.randint(vocab, (6,), generator=generator)
    targets[::2] = tile.argmax(1)[::2]
    row_scale = torch.tensor(0.37)
    expected, expected_gradient = score_rows_torch(tile.double(), targets, row_scale.double(), shape)
    stats, none = kernels.score_rows(tile.clone(), targets, None, shape)
    assert none is None
    for name, value, exact in zip(stats._fields, stats[:-1], expected[:-1], strict=False):
        assert value.dtype == {"correct": torch.bool, "target": torch.int64}.get(name, torch.float32)
        torch.testing.assert_close(value.to(exact.dtype), exact, rtol=1e-5, atol=2e-5)
    for dtype, close in {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}.items():
        logits = tile.clone()
        out = None if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
        again, gradient = kernels.score_rows(logits, targets, row_scale, shape, out)
        assert all(torch.equal(value, other) for value, other in zip(again[:-1], stats[:-1], strict=True))
        assert gradient.dtype == dtype and (gradient is logits) == (dtype == torch.float32)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=close, atol=close)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_extreme_and_non_finite_logits(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    tile = torch.zeros(5, 40)
    tile[0, 3], tile[1, 3] = 1e4, -1e4
    tile[:, 20:] = -torch.inf  # padding, including an entire block
    tile[2, :16] = -torch.inf  # the entire first block is -inf
    tile[3, 5], tile[4, 5] = torch.nan, torch.inf
    targets = torch.tensor([3, 4, 17, 1, 1])
    stats, gradient = kernels.score_rows(tile.clone(), targets, torch.tensor(1.0), RowOptions(Dft(0.5)))
    exact = tile[:3].double()
    expected, expected_gradient = score_rows_torch(
        exact, targets[:3], torch.tensor(1.0).double(), RowOptions(Dft(0.5))
    )
    for value, exact_value in zip(stats[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(value[:3].to(exact_value.dtype), exact_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[:3].double(), expected_gradient, rtol=1e-5, atol=1e-6)
    assert stats.nll[3:].isnan().all() and gradient[3:].isnan().any(1).all()


def test_the_argmax_of_equal_logits_is_the_first(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    tile = torch.zeros(2, 50)
    targets = torch.tensor([0, 33])
    for stats in (
        kernels.score_rows(tile.clone(), targets, None, RowOptions())[0],
        score_rows_torch(tile.clone(), targets, None, RowOptions())[0],
    ):
        assert stats.correct.tolist() == [True, False]


@pytest.mark.parametrize("offset", [30.0, 1e4])
def test_large_logits_lose_no_precision(kernels, monkeypatch, offset):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(6, 200, generator=generator).mul(2**9).round().div(2**9) + offset
    targets = tile.argmax(1)
    row_scale = torch.tensor(1.0)
    expected, expected_gradient = score_rows_torch(tile.double(), targets, row_scale.double(), RowOptions())
    stats, gradient = kernels.score_rows(tile.clone(), targets, row_scale, RowOptions())
    for value, exact in zip(stats[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(value.to(exact.dtype), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_divergence_of_large_logits_matches_float64(kernels, monkeypatch, offset):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    tile, base = (torch.randn(6, 200, generator=generator).mul(2**9).round().div(2**9) for _ in range(2))
    base = base + offset
    targets, row_scale = tile.argmax(1), torch.tensor(1.0)
    options = RowOptions(make_objective("asft", {"kl_weight": 2.0}))
    exact = score_rows_torch(tile.double(), targets, row_scale.double(), options, base=base.double())
    for weights in (NO_WEIGHTS, RowWeights(torch.zeros(6))):  # in one kernel, and in two
        stats, gradient = kernels.score_rows(tile.clone(), targets, row_scale, options, None, weights, base)
        torch.testing.assert_close(stats.kl.double(), exact[0].kl, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-5, atol=1e-6)


def test_the_divergence_of_logits_that_are_not_finite(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    tile, base = (torch.randn(3, 40, generator=generator) for _ in range(2))
    tile[:2, 20:] = base[:2, 20:] = -torch.inf  # padding of both, including an entire block
    tile[1, :16] = base[1, :16] = -torch.inf
    base[2, 3] = -torch.inf  # a token that only the base model excludes
    targets, options = torch.tensor([3, 17, 5]), RowOptions(make_objective("asft"))
    exact, expected = score_rows_torch(tile.double(), targets, torch.tensor(1.0), options, base=base.double())
    stats, gradient = kernels.score_rows(
        tile.clone(), targets, torch.tensor(1.0), options, None, NO_WEIGHTS, base
    )
    torch.testing.assert_close(stats.kl.double(), exact.kl, rtol=1e-5, atol=1e-5)
    assert stats.kl[:2].isfinite().all() and stats.kl[2] == torch.inf
    torch.testing.assert_close(gradient[:2].double(), expected[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1.0, None), (-0.5, None), (2.0, 5.0)])
@pytest.mark.parametrize("vocab", [330, 352, 500])
def test_the_largest_logits_are_selected_from_chunks(kernels, monkeypatch, vocab, shape):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "CHUNK", 8)
    tile = 3 * torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    tile[1], tile[2] = tile[1].sort().values, tile[2].round()  # close together, and equal
    targets, options = torch.arange(5), RowOptions(make_objective("eaft"), *shape)
    expected, gradient = score_rows_torch(tile.double(), targets, torch.tensor(1.0), options)
    launched = []
    monkeypatch.setattr(kernels, "_launch_rows", spy(kernels._launch_rows, launched))
    stats, actual = kernels.score_rows(tile.clone(), targets, torch.tensor(1.0), options)
    assert launched[0][-2] == 8 and launched[0][-1].shape == (5, -(-vocab // 8))
    torch.testing.assert_close(stats.weight.double(), expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.double(), gradient, rtol=1e-5, atol=2e-6)


def spy(function, calls):
    """Return the function, which appends its arguments to `calls`."""

    def called(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return called


@pytest.mark.parametrize("target", [-100, 50])
def test_a_target_outside_the_vocabulary_gives_nan(kernels, target):
    stats, _ = kernels.score_rows(torch.zeros(1, 50), torch.tensor([target]), None, RowOptions())
    assert stats.nll.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_is_in_place(kernels, monkeypatch, dtype):
    monkeypatch.setattr(kernels, "BLOCK", 8)
    numbers = torch.arange(21, dtype=dtype).view(3, 7)
    expected = numbers * 3
    assert kernels.scale_(numbers, torch.tensor(1.0)) is numbers and torch.equal(3 * numbers, expected)
    kernels.scale_(numbers, torch.tensor(3.0))
    assert torch.equal(numbers, expected)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from dft.loss.kernels import _scale
from dft.loss.row_kernels import row_gradients, row_statistics

kinds = {"targets": "*i64", "correct_out": "*i1"}
names = {*row_statistics.arg_names, *row_gradients.arg_names} - {*kinds}
scalars = {"slope", "level", "kl_weight", "scale", "softcap"}
for name in names:
    kinds[name] = "fp32" if name in scalars else "constexpr" if name.isupper() else "*fp32"
kinds |= dict.fromkeys([name for name in names if name.endswith("stride")] + ["vocab"], "i32")
cases = [
    (
        row_statistics,
        {**kinds, "gradient": kind},
        {
            "SOFTCAP": softcap, "BASE": base, "CHUNK": chunk, "COLLISION": not gradient, "GRADIENT": gradient,
            "KEEP": not gradient, "BLOCK": 4096,
        },
    )
    for kind, softcap, base, chunk, gradient in [
        ("*fp32", False, False, 0, True), ("*bf16", False, True, 0, True), ("*fp16", True, False, 0, True),
        ("*fp32", True, True, 32, False),
    ]
]
for kind, base in (("*fp32", True), ("*bf16", False)):
    constants = {"SOFTCAP": True, "BASE": base, "BLOCK": 4096}
    cases.append((row_gradients, {**kinds, "gradient": kind}, constants))
for kind in ("*fp32", "*bf16"):
    signature = {"numbers": kind, "factor": "*fp32", "count": "i64", "BLOCK": "constexpr"}
    cases.append((_scale, signature, {"BLOCK": 4096}))
for capability in (80, 90):
    for kernel, kinds, constants in cases:
        signature = {name: kinds[name] for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(f".target sm_{capability}" in compiled.asm["ptx"], len(compiled.asm["cubin"]) > 1000)
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """Compile in a new process, because Triton interprets kernels in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["True True"] * 16, done.stderr
