"""The fused head on a GPU: against float64, against the plain path, and that the host waits for nothing."""

import pytest
import torch

from dft import DFTTrainer, dft_loss, linear_dft_loss, make_objective
from dft.labels import loss_positions
from dft.loss import tiles
from dft.loss.options import BaseHead
from tests.loss.test_objectives import CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WIDTH, VOCAB = 64, 1000
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""How far gradients may be off, as a share of their norm."""


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, which would be compared with float64 here."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def case(dtype, batch=4, seq=33, vocab=VOCAB, share=0.6, spread=3.0, seed=0):
    """hidden (batch, seq, width), weight (vocab, width), bias (vocab,) and labels on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, WIDTH, generator=generator)
    weight = spread * torch.randn(vocab, WIDTH, generator=generator) / WIDTH**0.5
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[:, 1::3] = (hidden @ weight.t() + bias).argmax(-1)[:, :-1:3]
    labels[torch.rand(batch, seq, generator=generator) >= share] = -100
    made = [one.to("cuda", dtype).requires_grad_() for one in (hidden, weight, bias)]
    return *made, labels.cuda()


def gradients(loss, *tensors):
    loss.backward()
    found = [one.grad for one in tensors]
    for one in tensors:
        one.grad = None
    return found


def on_logits(hidden, weight, labels, *, bias=None, logit_scale=1.0, logit_softcap=None, **options):
    logits = hidden @ weight.t()
    logits = logit_scale * (logits if bias is None else logits + bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return dft_loss(logits, labels, **options)


def off(found, expected) -> float:
    return ((found.double().cpu() - expected.cpu()).norm() / expected.norm().cpu()).item()


@pytest.mark.parametrize("tile_rows", [7, 10_000])
@pytest.mark.parametrize("shape", [(1.0, None), (0.25, None), (2.0, 5.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_gradients_and_statistics_are_those_of_float64(monkeypatch, dtype, alpha, shape, tile_rows):
    monkeypatch.setitem(tiles.TILE_BYTES, "cuda", 4 * VOCAB * tile_rows)
    monkeypatch.setattr(tiles, "GROUP_BYTES", 2 * VOCAB * 20)  # two tiles, or all of them
    if tile_rows > 100:
        monkeypatch.setattr(tiles, "GROUP_BYTES", 2**31)
    hidden, weight, bias, labels = case(dtype)
    how = {"alpha": alpha, "num_items": 50, "logit_scale": shape[0], "logit_softcap": shape[1]}
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, **how)
    exact = [one.detach().double().cpu().requires_grad_() for one in (hidden, weight, bias)]
    expected, expected_stats = on_logits(exact[0], exact[1], labels.cpu(), bias=exact[2], **how)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    for name in ("nll", "p_correct", "weight", "entropy"):
        found, wanted = vars_of(stats, name), vars_of(expected_stats, name)
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(stats.target.cpu(), expected_stats.target)
    assert (stats.correct.cpu() == expected_stats.correct).double().mean() > 0.97  # but for ties
    for found, wanted in zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True):
        assert found.dtype == dtype and off(found, wanted) < DTYPES[dtype]


def vars_of(stats, name):
    return stats._asdict()[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_no_larger_than_that_of_the_plain_path(dtype):
    hidden, weight, _, labels = case(dtype, vocab=5000, spread=20.0)  # logits at which bfloat16 is coarse
    exact = [one.detach().double().cpu().requires_grad_() for one in (hidden, weight)]
    expected, stats = on_logits(*exact, labels.cpu())
    wanted = gradients(expected, *exact)
    loss, ours = linear_dft_loss(hidden, weight, labels)
    found = gradients(loss, hidden, weight)
    plain_loss, plain = on_logits(hidden, weight, labels)
    plain_found = gradients(plain_loss, hidden, weight)
    assert off(ours.p_correct, stats.p_correct) <= off(plain.p_correct, stats.p_correct) + 1e-6
    for one, other, want in zip(found, plain_found, wanted, strict=True):
        assert off(one, want) <= off(other, want) + 1e-3


def test_autocast_takes_its_own_precision():
    hidden, weight, _, labels = case(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = linear_dft_loss(hidden, weight, labels)
    exact = [one.detach().double().cpu().requires_grad_() for one in (hidden, weight)]
    expected, _ = on_logits(*exact, labels.cpu())
    for found, wanted in zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True):
        assert found.dtype == torch.float32 and off(found, wanted) < DTYPES[torch.bfloat16]


@pytest.mark.parametrize(("batch", "seq", "vocab"), [(1, 2, 2), (1, 2, 131_073), (3, 5, 4097), (2, 9, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype, batch, seq, vocab):
    hidden, weight, _, labels = case(dtype, batch, seq, vocab, share=1.1)
    loss, _ = linear_dft_loss(hidden, weight, labels)
    exact = [one.detach().double().cpu().requires_grad_() for one in (hidden, weight)]
    expected, _ = on_logits(*exact, labels.cpu())
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    for found, wanted in zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True):
        if wanted.norm() > 1e-6:
            assert off(found, wanted) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_learn_and_nothing_to_derive(dtype):
    hidden, weight, _, labels = case(dtype)
    loss, stats = linear_dft_loss(hidden, weight, torch.full_like(labels, -100))
    assert loss.item() == 0 and stats.nll.numel() == 0
    assert not any(one.any() for one in gradients(loss, hidden, weight))
    with torch.no_grad():
        scored, _ = linear_dft_loss(hidden, weight, labels)
    frozen, _ = linear_dft_loss(hidden, weight.detach(), labels)
    assert torch.equal(scored, frozen.detach())
    frozen.backward()
    assert hidden.grad is not None and weight.grad is None


def test_extreme_logits_stay_finite():
    hidden, weight, _, labels = case(torch.float32, spread=1e4)
    loss, stats = linear_dft_loss(hidden, weight, labels)
    found = gradients(loss, hidden, weight)
    assert all(one.isfinite().all() for one in (stats.nll, stats.entropy, *found))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_the_same_bits_again(dtype):
    hidden, weight, _, labels = case(dtype)
    runs = []
    for _ in range(2):
        loss, stats = linear_dft_loss(hidden, weight, labels)
        runs.append([loss.detach(), *stats, *gradients(loss, hidden, weight)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_the_host_waits_for_nothing():
    hidden, weight, _, labels = case(torch.bfloat16)
    positions, count = loss_positions(labels), torch.tensor(50, device="cuda")
    linear_dft_loss(hidden, weight, labels, positions=positions, num_items=count)[0].backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = linear_dft_loss(hidden, weight, labels, positions=positions, num_items=count)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trained_model_is_the_same_with_and_without_the_fused_head(tmp_path, bf16):
    from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

    losses = {}
    for fused in ("on", "off"):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
        rows = [torch.arange(20 + step).mul(7 + step).remainder(500).tolist() for step in range(64)]
        dataset = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / fused), max_steps=6, per_device_train_batch_size=8, logging_steps=1,
            learning_rate=1e-3, bf16=bf16, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DFTTrainer(model, arguments, fused_head=fused, train_dataset=dataset)
        trainer.train()
        losses[fused] = [record["nll"] for record in trainer.state.log_history if "nll" in record]
    assert losses["on"][-1] < losses["on"][0]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.objective.title)
@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("shape", [(1.0, None), (2.0, 5.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_objective(monkeypatch, dtype, shape, floored, one):
    monkeypatch.setitem(tiles.TILE_BYTES, "cuda", 4 * VOCAB * 7)
    monkeypatch.setattr(tiles, "GROUP_BYTES", 2 * VOCAB * 20)
    hidden, weight, bias, labels = case(dtype)
    anchored = one.objective.kl_weight > 0
    other_hidden, other_weight, other_bias, _ = (one.detach() for one in case(dtype, seed=1))
    how = {"objective": one.objective, "num_items": 50}
    floors = 0.4 * (labels % 3 == 0).float() if floored else None
    loss, stats = linear_dft_loss(
        hidden, weight, labels, bias=bias, logit_scale=shape[0], logit_softcap=shape[1], min_weight=floors,
        base=BaseHead(other_hidden, other_weight, other_bias) if anchored else None, **how,
    )  # fmt: skip
    exact = [one.detach().double().cpu().requires_grad_() for one in (hidden, weight, bias)]
    base = [one.double().cpu() for one in (other_hidden, other_weight, other_bias)]
    shaped = [shape[0] * (one[0] @ one[1].t() + one[2]) for one in (exact, base)]
    if shape[1] is not None:
        shaped = [shape[1] * torch.tanh(one / shape[1]) for one in shaped]
    expected, expected_stats = dft_loss(
        shaped[0], labels.cpu(), base_logits=shaped[1] if anchored else None,
        min_weight=None if floors is None else floors.cpu(), **how,
    )  # fmt: skip
    if one.objective.name != "threshold":  # a p beside the threshold may come to lie on its other side
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stats.weight.double().cpu(), expected_stats.weight, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(stats.kl.double().cpu(), expected_stats.kl, rtol=1e-3, atol=1e-3)
    for found, wanted in zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True):
        assert found.dtype == dtype and found.isfinite().all()
        if wanted.norm() > 1e-3:  # less is lost in float16; and no p may reach a threshold
            assert off(found, wanted) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("name", ["power", "eaft", "chord"])
def test_the_host_waits_for_no_objective(name):
    hidden, weight, _, labels = case(torch.bfloat16)
    how = {
        "positions": loss_positions(labels), "num_items": torch.tensor(50, device="cuda"),
        "objective": make_objective(name), "min_weight": torch.zeros(labels.shape, device="cuda"),
    }  # fmt: skip
    linear_dft_loss(hidden, weight, labels, **how)[0].backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_dft_loss(hidden, weight, labels, **how)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
