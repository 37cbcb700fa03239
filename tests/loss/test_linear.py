"""The fused head against the definition on whole logits, in float64 and in the precision of the model."""

import itertools
import weakref

import pytest
import torch
from torch import Tensor

from dft import dft_loss, linear_dft_loss
from dft.labels import loss_positions
from dft.loss import linear, products, rows, tiles

WIDTH, VOCAB = 16, 37
DTYPES = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
"""How far gradients may be off, as a share of their norm."""


def case(dtype=torch.float64, batch=3, seq=9, vocab=VOCAB, width=WIDTH, share=0.6, seed=0, spread=1.0):
    """hidden (batch, seq, width), weight (vocab, width), bias (vocab,), which require gradients; labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, width, generator=generator)
    weight = spread * torch.randn(vocab, width, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[:, 1::3] = (hidden @ weight.t() + bias).argmax(-1)[:, :-1:3]  # some that are right
    labels[torch.rand(batch, seq, generator=generator) >= share] = -100
    return *(one.to(dtype).requires_grad_() for one in (hidden, weight, bias)), labels


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    loss.backward()
    found = [one.grad for one in tensors]
    for one in tensors:
        one.grad = None
    return found


def on_logits(hidden, weight, labels, *, bias=None, logit_scale=1.0, logit_softcap=None, **options):
    """The definition, on all logits."""
    logits = hidden @ weight.t()
    logits = logit_scale * (logits if bias is None else logits + bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return dft_loss(logits, labels, **options)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [one.detach().double().requires_grad_() for one in tensors]


def off(found: Tensor, expected: Tensor) -> float:
    """The distance as a share of the norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Three rows fit a tile, so that every case has several and a last one that is not full."""
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * 3)
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * WIDTH * 5)
    monkeypatch.setattr(rows, "CACHED_BYTES", 4 * VOCAB * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
def test_loss_gradients_and_statistics_are_those_of_the_definition(dtype, alpha, shape, num_items):
    hidden, weight, bias, labels = case(dtype)
    how = {"alpha": alpha, "num_items": num_items, "logit_scale": shape[0], "logit_softcap": shape[1]}
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, **how)
    exact = wide(hidden, weight, bias)
    expected, expected_stats = on_logits(exact[0], exact[1], labels, bias=exact[2], **how)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    assert loss.dtype == stats.nll.dtype == torch.promote_types(dtype, torch.float32)
    for name, one, other in zip(stats._fields, stats, expected_stats, strict=True):
        assert not one.requires_grad
        if name in ("correct", "target"):
            assert torch.equal(one, other) and (name == "target" or 0 < one.sum() < len(one))
        else:
            torch.testing.assert_close(one.double(), other, rtol=5 * close, atol=5 * close)
    found, wanted = gradients(loss, hidden, weight, bias), gradients(expected, *exact)
    for one, other, given in zip(found, wanted, (hidden, weight, bias), strict=True):
        assert one.dtype == given.dtype and one.shape == given.shape
        assert off(one, other) < DTYPES[dtype]
    unsupervised = torch.ones(labels.numel(), dtype=torch.bool)
    unsupervised[loss_positions(labels)] = False
    assert not found[0].flatten(0, 1)[unsupervised].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_no_larger_than_that_of_logits_in_the_same_precision(dtype):
    """Logits of a trained model: up to 30, where bfloat16 has steps of 0.125."""
    for seed in range(5):
        hidden, weight, _, labels = case(dtype, batch=4, seq=33, vocab=301, width=64, spread=1.2, seed=seed)
        exact = wide(hidden, weight)
        expected, expected_stats = on_logits(*exact, labels)
        wanted = gradients(expected, *exact)
        plain, plain_stats = dft_loss(torch.nn.functional.linear(hidden, weight), labels)
        plain_gradients = gradients(plain, hidden, weight)
        fused, stats = linear_dft_loss(hidden, weight, labels)
        fused_gradients = gradients(fused, hidden, weight)
        tolerance = 1e-6
        errors = (
            (stats.nll - expected_stats.nll).abs().max(),
            (plain_stats.nll - expected_stats.nll).abs().max(),
        )
        assert errors[0] <= errors[1] + 1e-5
        if dtype != torch.float32:
            assert errors[0] < errors[1] / 50, "logits are not float32"
        assert abs(fused - expected) <= abs(plain - expected) + tolerance
        for one, other, target in zip(fused_gradients, plain_gradients, wanted, strict=True):
            assert off(one, target) <= off(other, target) + tolerance


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_what_requires_a_gradient_gets_one(needs, monkeypatch):
    hidden, weight, bias, labels = case()
    tensors = [
        one.detach().requires_grad_(wanted) for one, wanted in zip((hidden, weight, bias), needs, strict=True)
    ]
    products = []
    mm, addmm = torch.mm, Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    monkeypatch.setattr(Tensor, "addmm_", lambda *a, **k: products.append(1) or addmm(*a, **k))
    loss, stats = linear_dft_loss(tensors[0], tensors[1], labels, bias=tensors[2])
    expected, _ = on_logits(hidden, weight, labels, bias=bias)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    number = len(tiles.tiles(len(stats.nll), VOCAB, 8, "cpu"))
    assert number > 1
    assert len(products) == number * (1 + needs[0] + needs[1])
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    wanted = gradients(expected, hidden, weight, bias)
    for one, other, need in zip(tensors, wanted, needs, strict=True):
        assert (one.grad is not None) == need
        if need:
            torch.testing.assert_close(one.grad, other)


def test_without_gradients_there_is_one_product_per_tile(monkeypatch):
    hidden, weight, bias, labels = case()
    expected, expected_stats = linear_dft_loss(hidden, weight, labels, bias=bias)
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    monkeypatch.setattr(Tensor, "addmm_", lambda *a, **k: pytest.fail("a gradient"))
    with torch.no_grad():
        loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias)
    assert len(products) == len(tiles.tiles(len(stats.nll), VOCAB, 8, "cpu"))
    assert not loss.requires_grad and torch.equal(loss, expected)
    assert all(torch.equal(one, other) for one, other in zip(stats, expected_stats, strict=True))


@pytest.mark.parametrize(
    "batch, seq, vocab, width, share",
    [(1, 2, 1, 1, 1.0), (1, 2, 37, 16, 1.0), (2, 3, 2, 3, 1.0), (5, 17, 101, 7, 0.3), (1, 64, 5, 33, 0.9)],
)
def test_odd_shapes(batch, seq, vocab, width, share):
    hidden, weight, bias, labels = case(batch=batch, seq=seq, vocab=vocab, width=width, share=share)
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, alpha=0.5)
    exact = wide(hidden, weight, bias)
    expected, _ = on_logits(exact[0], exact[1], labels, bias=exact[2], alpha=0.5)
    torch.testing.assert_close(loss, expected)
    assert len(stats.nll) == (labels[:, 1:] != -100).sum() > 0
    for one, other in zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seq", [1, 5])
def test_without_a_supervised_token_loss_and_gradients_are_zeros_in_the_graph(seq):
    hidden, weight, bias, labels = case(seq=seq)
    labels[:, 1:] = -100  # a first token has nothing in front of it that could predict it
    for num_items in (None, 0, 12, torch.tensor(0)):
        loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, num_items=num_items)
        assert loss.item() == 0 and all(len(one) == 0 for one in stats)
        for one in gradients(loss, hidden, weight, bias):
            assert one is not None and not one.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1e4, -1e4])
@pytest.mark.parametrize("size", [0, 1e4, -1e4])
def test_extreme_logits(dtype, size, offset):
    """One column dominates every row or none does, all are far from 0, two are padding, never chosen."""
    hidden, weight, bias, labels = case(torch.float64)
    labels[labels >= VOCAB - 2] = 0
    with torch.no_grad():
        bias += offset
        bias[3] += size
        bias[-2:] = -torch.inf
    hidden, weight, bias = (one.detach().to(dtype).requires_grad_() for one in (hidden, weight, bias))
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, alpha=0.5)
    found = gradients(loss, hidden, weight, bias)
    exact = wide(hidden, weight, bias)
    expected, expected_stats = on_logits(exact[0], exact[1], labels, bias=exact[2], alpha=0.5)
    # What a logit of ten thousand is rounded by, in float32 or wider, before anything is done to it.
    rounding = torch.finfo(stats.nll.dtype).eps * (1e4 if size or offset else 30) * 2
    assert (stats.nll - expected_stats.nll).abs().max() <= rounding
    assert (stats.entropy - expected_stats.entropy).abs().max() <= rounding * 30
    close = max(DTYPES[dtype], 4 * rounding)
    for one, other in zip(found, gradients(expected, *exact), strict=True):
        assert one.isfinite().all() and off(one, other) <= close


@pytest.mark.parametrize("offset", [1.0, 30.0, 300.0, 1e4])
def test_rows_lose_nothing_to_the_size_of_their_logits(offset):
    """Exact numbers far from 0: the error is that of cross-entropy, which subtracts the greatest first."""
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(64, 200, generator=generator).mul(2**9).round().div(2**9) + offset
    targets = tile.argmax(1)
    targets[::2] = 7
    expected, _ = rows.score_rows_torch(tile.double(), targets, None, rows.RowOptions())
    stats, _ = rows.score_rows_torch(tile.clone(), targets, None, rows.RowOptions())
    plain = torch.nn.functional.cross_entropy(tile, targets, reduction="none")
    assert (stats.nll - expected.nll).abs().max() <= (plain - expected.nll).abs().max() + 1e-6
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, rtol=2e-6, atol=2e-6)


def test_one_tile_at_a_time_is_held(monkeypatch):
    """As on a GPU, where every tile is made anew."""
    held, most = [], 0

    def product(some, weight, space):
        nonlocal most
        made = some @ weight.t()
        held.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in held))
        return made

    monkeypatch.setattr(tiles, "wide_product", product)
    hidden, weight, _, labels = case(torch.float32)
    linear_dft_loss(hidden, weight, labels)
    with torch.no_grad():
        linear_dft_loss(hidden, weight, labels)
    assert len(held) > 4 and most == 1


def test_what_is_not_finite_shows():
    hidden, weight, _, labels = case(torch.float32)
    with torch.no_grad():
        hidden[0, 3] = torch.nan
    labels[0, 4] = 1
    loss, stats = linear_dft_loss(hidden, weight, labels)
    assert loss.isnan() and stats.nll.isnan().sum() == 1


def test_results_are_the_same_every_time_and_whatever_the_tiles(monkeypatch):
    hidden, weight, bias, labels = case(torch.float32)
    runs = []
    for count in (3, 3, 1, 7, 1000):
        monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * count)
        loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias)
        runs.append([loss.detach(), *stats, *gradients(loss, hidden, weight, bias)])
    assert all(torch.equal(one, other) for one, other in zip(runs[0], runs[1], strict=True))
    for other in runs[2:]:
        for one, two in zip(runs[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [1000, 32_000, 152_000, 1_000_000, 10**9])
@pytest.mark.parametrize("tokens", [0, 1, 100, 4097])
def test_a_tile_stays_under_its_budget(monkeypatch, vocab, tokens):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 64 * 2**20)
    spans = tiles.tiles(tokens, vocab, 4, "cpu")
    assert [row for start, end in spans for row in range(start, end)] == list(range(tokens))
    for start, end in spans:
        assert end - start == 1 or (end - start) * vocab * 4 <= 64 * 2**20


def test_given_positions_are_used_and_nothing_is_counted(monkeypatch):
    hidden, weight, _, labels = case()
    positions = loss_positions(labels)
    assert positions.tolist() == [
        row * 9 + column for row in range(3) for column in range(8) if labels[row, column + 1] != -100
    ]
    expected, _ = linear_dft_loss(hidden, weight, labels)
    monkeypatch.setattr(linear, "loss_positions", lambda labels: pytest.fail("counted"))
    loss, _ = linear_dft_loss(hidden, weight, labels, positions=positions)
    assert torch.equal(loss, expected)


def test_the_backward_only_scales_and_not_by_one(monkeypatch):
    hidden, weight, bias, labels = case(torch.float32)
    once = gradients(linear_dft_loss(hidden, weight, labels, bias=bias)[0], hidden, weight, bias)
    loss, _ = linear_dft_loss(hidden, weight, labels, bias=bias)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: pytest.fail("a product in the backward"))
    threefold = gradients(3 * loss, hidden, weight, bias)
    for one, other in zip(once, threefold, strict=True):
        torch.testing.assert_close(3 * one, other)
    given = torch.ones(4)
    assert products.scaled(given, torch.tensor(1.0), torch.float32) is given
    assert products.scaled(given, torch.tensor(2.0), torch.float32) is given and given[0] == 2
    half = products.scaled(given, torch.tensor(0.5), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half[0] == 1 and given[0] == 2


def test_a_second_derivative_and_a_second_backward_are_refused():
    hidden, weight, _, labels = case()
    loss, _ = linear_dft_loss(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss, _ = linear_dft_loss(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, bias, labels = case()
    for wrong in (
        (hidden[0], weight, labels),
        (hidden, weight[:, 1:], labels),
        (hidden, weight, labels[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"hidden must be \(batch, seq, hidden\)"):
            linear_dft_loss(*wrong)
    with pytest.raises(ValueError, match=r"bias must be \(vocab,\), got \(36,\) with 37 tokens"):
        linear_dft_loss(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="alpha"):
        linear_dft_loss(hidden, weight, labels, alpha=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_wide_weights_loses_nothing_on_a_cpu(dtype):
    hidden, weight, bias, labels = case(torch.float32)
    expected = linear_dft_loss(hidden, weight, labels, bias=bias)[0]
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_dft_loss(hidden, weight, labels, bias=bias)[0]
        narrow = linear_dft_loss(hidden.to(dtype), weight, labels, bias=bias)[0]
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    found, wanted = gradients(loss, hidden, weight), gradients(expected, hidden, weight)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert narrow.item() == pytest.approx(loss.item(), rel=2e-2)


@pytest.mark.parametrize("num_items, scale", [(1e6, 1.0), (1.0, 40.0), (0.125, 1.0)])
def test_float16_gradients_neither_vanish_nor_overflow(monkeypatch, num_items, scale):
    """As on a GPU, where the gradient on the logits is written in float16: it ends at 6e-8 and at 65,504."""

    def narrow(tile, targets, row_scale, options, *_):
        stats, gradient = rows.score_rows_torch(tile, targets, row_scale, options)
        assert gradient.abs().max() < 65504
        return stats, gradient.half().float()

    monkeypatch.setattr(tiles, "score_rows", narrow)
    how = {"num_items": num_items, "logit_scale": scale}
    hidden, weight, _, labels = case(torch.float16, spread=0.1)
    loss, _ = linear_dft_loss(hidden, weight, labels, **how)
    exact = wide(hidden, weight)
    expected, _ = on_logits(*exact, labels, **how)
    by = 2.0**12 if num_items > 1 else 2.0**-6  # as a scaler of gradients would
    found, wanted = gradients(by * loss, hidden, weight), gradients(by * expected, *exact)
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 0.02


def test_a_number_of_items_is_a_scalar_of_any_precision():
    hidden, weight, _, labels = case(torch.float32)
    loss, _ = linear_dft_loss(hidden, weight, labels, num_items=torch.tensor(7.0, dtype=torch.float64))
    assert loss.dtype == torch.float32
    with pytest.raises(ValueError, match=r"num_items must be a scalar, got a tensor of shape \(1,\)"):
        linear_dft_loss(hidden, weight, labels, num_items=torch.tensor([7]))
