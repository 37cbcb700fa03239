"""`linear_dft_loss` against `dft_loss` on logits, in float64 and in the dtype of the model."""

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
"""Maximum error of gradients, relative to their norm."""


def case(dtype=torch.float64, batch=3, seq=9, vocab=VOCAB, width=WIDTH, share=0.6, seed=0, spread=1.0):
    """Return hidden (batch, seq, width), weight (vocab, width), bias (vocab,) and labels (batch, seq)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, width, generator=generator)
    weight = spread * torch.randn(vocab, width, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[:, 1::3] = (hidden @ weight.t() + bias).argmax(-1)[:, :-1:3]  # some argmax tokens
    labels[torch.rand(batch, seq, generator=generator) >= share] = -100
    return *(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)), labels


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    loss.backward()
    grads = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return grads


def on_logits(hidden, weight, labels, *, bias=None, logit_scale=1.0, logit_softcap=None, **options):
    """Compute the loss by its definition, from all logits."""
    logits = hidden @ weight.t()
    logits = logit_scale * (logits if bias is None else logits + bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return dft_loss(logits, labels, **options)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the expected tensor."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Let a tile hold three rows, so that every case has several tiles, the last one partial."""
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * 3)
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * WIDTH * 5)
    monkeypatch.setattr(rows, "CACHED_BYTES", 4 * VOCAB * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
def test_loss_gradients_and_statistics_match_the_definition(dtype, alpha, shape, num_items):
    hidden, weight, bias, labels = case(dtype)
    how = {"alpha": alpha, "num_items": num_items, "logit_scale": shape[0], "logit_softcap": shape[1]}
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, **how)
    exact = wide(hidden, weight, bias)
    expected, expected_stats = on_logits(exact[0], exact[1], labels, bias=exact[2], **how)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    assert loss.dtype == stats.nll.dtype == torch.promote_types(dtype, torch.float32)
    for name, value, reference in zip(stats._fields, stats[:-1], expected_stats[:-1], strict=False):
        assert not value.requires_grad
        if name in ("correct", "target"):
            assert torch.equal(value, reference) and (name == "target" or 0 < value.sum() < len(value))
        else:
            torch.testing.assert_close(value.double(), reference, rtol=5 * close, atol=5 * close)
    grads, references = gradients(loss, hidden, weight, bias), gradients(expected, *exact)
    for grad, reference, tensor in zip(grads, references, (hidden, weight, bias), strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
        assert relative_error(grad, reference) < DTYPES[dtype]
    unsupervised = torch.ones(labels.numel(), dtype=torch.bool)
    unsupervised[loss_positions(labels)] = False
    assert not grads[0].flatten(0, 1)[unsupervised].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_no_larger_than_that_of_logits_in_the_same_dtype(dtype):
    """Logits reach 30, as those of a trained model, where bfloat16 has steps of 0.125."""
    for seed in range(5):
        hidden, weight, _, labels = case(dtype, batch=4, seq=33, vocab=301, width=64, spread=1.2, seed=seed)
        exact = wide(hidden, weight)
        expected, expected_stats = on_logits(*exact, labels)
        references = gradients(expected, *exact)
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
        for fused_grad, plain_grad, reference in zip(
            fused_gradients, plain_gradients, references, strict=True
        ):
            limit = relative_error(plain_grad, reference) + tolerance
            assert relative_error(fused_grad, reference) <= limit


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_inputs_that_require_a_gradient_get_one(needs, monkeypatch):
    hidden, weight, bias, labels = case()
    tensors = [
        tensor.detach().requires_grad_(need)
        for tensor, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    products = []
    mm, addmm = torch.mm, Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    monkeypatch.setattr(Tensor, "addmm_", lambda *a, **k: products.append(1) or addmm(*a, **k))
    loss, stats = linear_dft_loss(tensors[0], tensors[1], labels, bias=tensors[2])
    expected, _ = on_logits(hidden, weight, labels, bias=bias)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    number = len(tiles.tiles(len(stats.nll), VOCAB, 8, tiles.TILE_BYTES["cpu"]))
    assert number > 1
    assert len(products) == number * (1 + needs[0] + needs[1])
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    references = gradients(expected, hidden, weight, bias)
    for tensor, reference, need in zip(tensors, references, needs, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, reference)


def test_without_gradients_there_is_one_product_per_tile(monkeypatch):
    hidden, weight, bias, labels = case()
    expected, expected_stats = linear_dft_loss(hidden, weight, labels, bias=bias)
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    monkeypatch.setattr(Tensor, "addmm_", lambda *a, **k: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias)
    assert len(products) == len(tiles.tiles(len(stats.nll), VOCAB, 8, tiles.TILE_BYTES["cpu"]))
    assert not loss.requires_grad and torch.equal(loss, expected)
    assert all(
        torch.equal(value, expected) for value, expected in zip(stats[:-1], expected_stats[:-1], strict=True)
    )


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
    pairs = zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True)
    for grad, reference in pairs:
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("seq", [1, 5])
def test_without_supervised_tokens_loss_and_gradients_are_zeros_attached_to_the_graph(seq):
    hidden, weight, bias, labels = case(seq=seq)
    labels[:, 1:] = -100  # no position predicts the first token
    for num_items in (None, 0, 12, torch.tensor(0)):
        loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, num_items=num_items)
        assert loss.item() == 0 and all(len(value) == 0 for value in stats[:-1])
        for grad in gradients(loss, hidden, weight, bias):
            assert grad is not None and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1e4, -1e4])
@pytest.mark.parametrize("size", [0, 1e4, -1e4])
def test_extreme_logits(dtype, size, offset):
    """Test dominating columns, logits far from 0, and columns of -inf."""
    hidden, weight, bias, labels = case(torch.float64)
    labels[labels >= VOCAB - 2] = 0
    with torch.no_grad():
        bias += offset
        bias[3] += size
        bias[-2:] = -torch.inf
    hidden, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, bias))
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, alpha=0.5)
    grads = gradients(loss, hidden, weight, bias)
    exact = wide(hidden, weight, bias)
    expected, expected_stats = on_logits(exact[0], exact[1], labels, bias=exact[2], alpha=0.5)
    # The rounding error of a logit of 10,000 itself, in float32 or wider.
    rounding = torch.finfo(stats.nll.dtype).eps * (1e4 if size or offset else 30) * 2
    assert (stats.nll - expected_stats.nll).abs().max() <= rounding
    assert (stats.entropy - expected_stats.entropy).abs().max() <= rounding * 30
    close = max(DTYPES[dtype], 4 * rounding)
    for grad, reference in zip(grads, gradients(expected, *exact), strict=True):
        assert grad.isfinite().all() and relative_error(grad, reference) <= close


@pytest.mark.parametrize("offset", [1.0, 30.0, 300.0, 1e4])
def test_large_logits_lose_no_precision(offset):
    """Logits are exact and far from 0; the error is that of cross-entropy, which subtracts the largest."""
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(64, 200, generator=generator).mul(2**9).round().div(2**9) + offset
    targets = tile.argmax(1)
    targets[::2] = 7
    expected, _ = rows.score_rows_torch(tile.double(), targets, None, rows.RowOptions())
    stats, _ = rows.score_rows_torch(tile.clone(), targets, None, rows.RowOptions())
    plain = torch.nn.functional.cross_entropy(tile, targets, reduction="none")
    assert (stats.nll - expected.nll).abs().max() <= (plain - expected.nll).abs().max() + 1e-6
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, rtol=2e-6, atol=2e-6)


def test_only_one_tile_is_in_memory(monkeypatch):
    """Each tile is a new tensor, as on a GPU."""
    references, most = [], 0

    def product(rows, weight, buffer):
        nonlocal most
        tile = rows @ weight.t()
        references.append(weakref.ref(tile))
        most = max(most, sum(reference() is not None for reference in references))
        return tile

    monkeypatch.setattr(tiles, "wide_product", product)
    hidden, weight, _, labels = case(torch.float32)
    linear_dft_loss(hidden, weight, labels)
    with torch.no_grad():
        linear_dft_loss(hidden, weight, labels)
    assert len(references) > 4 and most == 1


def test_nan_hidden_states_give_a_nan_loss():
    hidden, weight, _, labels = case(torch.float32)
    with torch.no_grad():
        hidden[0, 3] = torch.nan
    labels[0, 4] = 1
    loss, stats = linear_dft_loss(hidden, weight, labels)
    assert loss.isnan() and stats.nll.isnan().sum() == 1


def test_results_are_reproducible_and_independent_of_the_tile_size(monkeypatch):
    hidden, weight, bias, labels = case(torch.float32)
    runs = []
    for count in (3, 3, 1, 7, 1000):
        monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * count)
        loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias)
        runs.append([loss.detach(), *stats[:-1], *gradients(loss, hidden, weight, bias)])
    assert all(torch.equal(first, second) for first, second in zip(runs[0], runs[1], strict=True))
    for run in runs[2:]:
        for first, other in zip(runs[0], run, strict=True):
            torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [1000, 32_000, 152_000, 1_000_000, 10**9])
@pytest.mark.parametrize("tokens", [0, 1, 100, 4097])
def test_tiles_fit_their_size_limit(monkeypatch, vocab, tokens):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 64 * 2**20)
    spans = tiles.tiles(tokens, vocab, 4, tiles.TILE_BYTES["cpu"])
    assert [row for start, end in spans for row in range(start, end)] == list(range(tokens))
    for start, end in spans:
        assert end - start == 1 or (end - start) * vocab * 4 <= 64 * 2**20


def test_positions_that_are_passed_are_not_computed_again(monkeypatch):
    hidden, weight, _, labels = case()
    positions = loss_positions(labels)
    assert positions.tolist() == [
        row * 9 + column for row in range(3) for column in range(8) if labels[row, column + 1] != -100
    ]
    expected, _ = linear_dft_loss(hidden, weight, labels)
    monkeypatch.setattr(linear, "loss_positions", lambda *_: pytest.fail("positions were computed"))
    loss, _ = linear_dft_loss(hidden, weight, labels, positions=positions)
    assert torch.equal(loss, expected)


def test_the_backward_only_scales_and_skips_a_factor_of_1(monkeypatch):
    hidden, weight, bias, labels = case(torch.float32)
    once = gradients(linear_dft_loss(hidden, weight, labels, bias=bias)[0], hidden, weight, bias)
    loss, _ = linear_dft_loss(hidden, weight, labels, bias=bias)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: pytest.fail("the backward computed a product"))
    threefold = gradients(3 * loss, hidden, weight, bias)
    for grad, tripled in zip(once, threefold, strict=True):
        torch.testing.assert_close(3 * grad, tripled)
    grad = torch.ones(4)
    assert products.scaled(grad, torch.tensor(1.0), torch.float32) is grad
    assert products.scaled(grad, torch.tensor(2.0), torch.float32) is grad and grad[0] == 2
    half = products.scaled(grad, torch.tensor(0.5), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half[0] == 1 and grad[0] == 2


def test_a_second_derivative_and_a_second_backward_raise():
    hidden, weight, _, labels = case()
    loss, _ = linear_dft_loss(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss, _ = linear_dft_loss(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_mismatched_shapes_raise():
    hidden, weight, bias, labels = case()
    for inputs in (
        (hidden[0], weight, labels),
        (hidden, weight[:, 1:], labels),
        (hidden, weight, labels[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"hidden must be \(batch, seq, hidden\)"):
            linear_dft_loss(*inputs)
    with pytest.raises(ValueError, match=r"bias must be \(vocab,\), got \(36,\) with 37 tokens"):
        linear_dft_loss(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="alpha"):
        linear_dft_loss(hidden, weight, labels, alpha=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_float32_weights_on_a_cpu(dtype):
    hidden, weight, bias, labels = case(torch.float32)
    expected = linear_dft_loss(hidden, weight, labels, bias=bias)[0]
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_dft_loss(hidden, weight, labels, bias=bias)[0]
        narrow = linear_dft_loss(hidden.to(dtype), weight, labels, bias=bias)[0]
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True)
    assert all(torch.equal(grad, reference) for grad, reference in pairs)
    assert narrow.item() == pytest.approx(loss.item(), rel=2e-2)


@pytest.mark.parametrize("num_items, scale", [(1e6, 1.0), (1.0, 40.0), (0.125, 1.0)])
def test_float16_gradients_neither_vanish_nor_overflow(monkeypatch, num_items, scale):
    """The gradient on the logits is rounded to float16, whose range is 6e-8 to 65,504, as on a GPU."""

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
    factor = 2.0**12 if num_items > 1 else 2.0**-6  # the scale of a gradient scaler
    pairs = zip(gradients(factor * loss, hidden, weight), gradients(factor * expected, *exact), strict=True)
    assert all(relative_error(grad, reference) < 0.02 for grad, reference in pairs)


def test_num_items_is_a_scalar_of_any_dtype():
    hidden, weight, _, labels = case(torch.float32)
    loss, _ = linear_dft_loss(hidden, weight, labels, num_items=torch.tensor(7.0, dtype=torch.float64))
    assert loss.dtype == torch.float32
    with pytest.raises(ValueError, match=r"num_items must be a scalar, got a tensor of shape \(1,\)"):
        linear_dft_loss(hidden, weight, labels, num_items=torch.tensor([7]))
