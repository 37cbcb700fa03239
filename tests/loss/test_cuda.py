"""The fused head on a GPU against float64 and the plain path, without synchronizing host and device."""

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
"""Maximum error of gradients, relative to their norm."""
OBJECTIVES = [case.objective for case in CASES]


@pytest.fixture(autouse=True)
def exact_products():
    """Disable TF32, because results are compared with float64."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def case(dtype, batch=4, seq=33, vocab=VOCAB, share=0.6, spread=3.0, seed=0):
    """Return hidden (batch, seq, width), weight (vocab, width), bias (vocab,) and labels on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, WIDTH, generator=generator)
    weight = spread * torch.randn(vocab, WIDTH, generator=generator) / WIDTH**0.5
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[:, 1::3] = (hidden @ weight.t() + bias).argmax(-1)[:, :-1:3]
    labels[torch.rand(batch, seq, generator=generator) >= share] = -100
    inputs = [tensor.to("cuda", dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return *inputs, labels.cuda()


def gradients(loss, *tensors):
    loss.backward()
    grads = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return grads


def on_logits(hidden, weight, labels, *, bias=None, logit_scale=1.0, logit_softcap=None, **options):
    logits = hidden @ weight.t()
    logits = logit_scale * (logits if bias is None else logits + bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return dft_loss(logits, labels, **options)


def relative_error(actual, expected) -> float:
    return ((actual.double().cpu() - expected.cpu()).norm() / expected.norm().cpu()).item()


@pytest.mark.parametrize("tile_rows", [7, 10_000])
@pytest.mark.parametrize("shape", [(1.0, None), (0.25, None), (2.0, 5.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_gradients_and_statistics_match_float64(monkeypatch, dtype, alpha, shape, tile_rows):
    monkeypatch.setitem(tiles.TILE_BYTES, "cuda", 4 * VOCAB * tile_rows)
    monkeypatch.setattr(tiles, "GROUP_BYTES", 2 * VOCAB * 20)  # groups of two tiles
    if tile_rows > 100:
        monkeypatch.setattr(tiles, "GROUP_BYTES", 2**31)
    hidden, weight, bias, labels = case(dtype)
    how = {"alpha": alpha, "num_items": 50, "logit_scale": shape[0], "logit_softcap": shape[1]}
    loss, stats = linear_dft_loss(hidden, weight, labels, bias=bias, **how)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (hidden, weight, bias)]
    expected, expected_stats = on_logits(exact[0], exact[1], labels.cpu(), bias=exact[2], **how)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    for name in ("nll", "p_correct", "weight", "entropy"):
        actual, exact_value = stats._asdict()[name], expected_stats._asdict()[name]
        torch.testing.assert_close(actual.double().cpu(), exact_value, rtol=1e-3, atol=1e-4)
    assert torch.equal(stats.target.cpu(), expected_stats.target)
    assert (stats.correct.cpu() == expected_stats.correct).double().mean() > 0.97  # the rest are ties
    pairs = zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True)
    for actual, reference in pairs:
        assert actual.dtype == dtype and relative_error(actual, reference) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_no_larger_than_that_of_the_plain_path(dtype):
    # Large logits, which bfloat16 rounds coarsely.
    hidden, weight, _, labels = case(dtype, vocab=5000, spread=20.0)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (hidden, weight)]
    expected, stats = on_logits(*exact, labels.cpu())
    exact_gradients = gradients(expected, *exact)
    loss, ours = linear_dft_loss(hidden, weight, labels)
    fused_gradients = gradients(loss, hidden, weight)
    plain_loss, plain = on_logits(hidden, weight, labels)
    plain_gradients = gradients(plain_loss, hidden, weight)
    rounding = relative_error(plain.p_correct, stats.p_correct)
    assert relative_error(ours.p_correct, stats.p_correct) <= rounding + 1e-6
    for actual, rounded, reference in zip(fused_gradients, plain_gradients, exact_gradients, strict=True):
        limit = relative_error(rounded, reference) + 1e-3
        assert relative_error(actual, reference) <= limit


def test_products_are_in_the_dtype_of_autocast():
    hidden, weight, _, labels = case(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = linear_dft_loss(hidden, weight, labels)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (hidden, weight)]
    expected, _ = on_logits(*exact, labels.cpu())
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True)
    for actual, reference in pairs:
        assert actual.dtype == torch.float32 and relative_error(actual, reference) < DTYPES[torch.bfloat16]


@pytest.mark.parametrize(("batch", "seq", "vocab"), [(1, 2, 2), (1, 2, 131_073), (3, 5, 4097), (2, 9, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype, batch, seq, vocab):
    hidden, weight, _, labels = case(dtype, batch, seq, vocab, share=1.1)
    loss, _ = linear_dft_loss(hidden, weight, labels)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (hidden, weight)]
    expected, _ = on_logits(*exact, labels.cpu())
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True)
    for actual, reference in pairs:
        if reference.norm() > 1e-6:
            assert relative_error(actual, reference) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_supervised_tokens_no_grad_and_frozen_weights(dtype):
    hidden, weight, _, labels = case(dtype)
    loss, stats = linear_dft_loss(hidden, weight, torch.full_like(labels, -100))
    assert loss.item() == 0 and stats.nll.numel() == 0
    assert not any(gradient.any() for gradient in gradients(loss, hidden, weight))
    with torch.no_grad():
        scored, _ = linear_dft_loss(hidden, weight, labels)
    frozen, _ = linear_dft_loss(hidden, weight.detach(), labels)
    assert torch.equal(scored, frozen.detach())
    frozen.backward()
    assert hidden.grad is not None and weight.grad is None


def test_extreme_logits_stay_finite():
    hidden, weight, _, labels = case(torch.float32, spread=1e4)
    loss, stats = linear_dft_loss(hidden, weight, labels)
    tensors = (stats.nll, stats.entropy, *gradients(loss, hidden, weight))
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_bitwise_reproducible(dtype):
    hidden, weight, _, labels = case(dtype)
    runs = []
    for _ in range(2):
        loss, stats = linear_dft_loss(hidden, weight, labels)
        runs.append([loss.detach(), *stats, *gradients(loss, hidden, weight)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_the_host_does_not_synchronize_with_the_device():
    hidden, weight, _, labels = case(torch.bfloat16)
    positions, count = loss_positions(labels), torch.tensor(50, device="cuda")
    linear_dft_loss(hidden, weight, labels, positions=positions, num_items=count)[
        0
    ].backward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = linear_dft_loss(hidden, weight, labels, positions=positions, num_items=count)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bf16", [False, True])
def test_training_gives_the_same_losses_with_and_without_the_fused_head(tmp_path, bf16):
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


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.title)
@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1.0, None), (2.0, 5.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_objective_matches_float64(monkeypatch, dtype, shape, floored, weighted, objective):
    monkeypatch.setitem(tiles.TILE_BYTES, "cuda", 4 * VOCAB * 7)
    monkeypatch.setattr(tiles, "GROUP_BYTES", 2 * VOCAB * 20)
    hidden, weight, bias, labels = case(dtype)
    anchored = objective.kl_weight > 0
    other_hidden, other_weight, other_bias, _ = (tensor.detach() for tensor in case(dtype, seed=1))
    how = {"objective": objective, "num_items": 50}
    scores = -3.0 - labels % 3 if objective.needs_base_logp else None
    floors = 0.4 * (labels % 3 == 0).float() if floored else None
    factors = 0.25 * (1 + labels % 4) if weighted else None
    loss, stats = linear_dft_loss(
        hidden, weight, labels, bias=bias, logit_scale=shape[0], logit_softcap=shape[1], min_weight=floors,
        loss_weight=factors, base_logp=scores,
        base=BaseHead(other_hidden, other_weight, other_bias) if anchored else None, **how,
    )  # fmt: skip
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (hidden, weight, bias)]
    base = [tensor.double().cpu() for tensor in (other_hidden, other_weight, other_bias)]
    shaped = [shape[0] * (inputs[0] @ inputs[1].t() + inputs[2]) for inputs in (exact, base)]
    if shape[1] is not None:
        shaped = [shape[1] * torch.tanh(logits / shape[1]) for logits in shaped]
    expected, expected_stats = dft_loss(
        shaped[0], labels.cpu(), base_logits=shaped[1] if anchored else None,
        min_weight=None if floors is None else floors.cpu(),
        base_logp=None if scores is None else scores.cpu(),
        loss_weight=None if factors is None else factors.cpu(), **how,
    )  # fmt: skip
    if objective.name not in ("threshold", "psft"):  # rounding may move a p across the threshold
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stats.weight.double().cpu(), expected_stats.weight, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(stats.kl.double().cpu(), expected_stats.kl, rtol=1e-3, atol=1e-3)
    pairs = zip(gradients(loss, hidden, weight, bias), gradients(expected, *exact), strict=True)
    for actual, reference in pairs:
        assert actual.dtype == dtype and actual.isfinite().all()
        # Smaller ones underflow in float16, and it may be that no p reaches the threshold.
        if reference.norm() > 1e-3:
            assert relative_error(actual, reference) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("name", ["asft", "eaft", "deft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_logits_match_float64(dtype, name):
    """The largest logits are selected from chunks, squares summed, and a base model is read as well."""
    hidden, weight, _, labels = case(dtype, vocab=9001)
    other_hidden, other_weight, _, _ = (tensor.detach() for tensor in case(dtype, vocab=9001, seed=1))
    objective = make_objective(name)
    base = BaseHead(other_hidden, other_weight) if objective.kl_weight else None
    loss, stats = linear_dft_loss(hidden, weight, labels, objective=objective, base=base)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (hidden, weight)]
    base_logits = other_hidden.double().cpu() @ other_weight.double().cpu().t() if base else None
    expected, expected_stats = on_logits(*exact, labels.cpu(), objective=objective, base_logits=base_logits)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stats.weight.double().cpu(), expected_stats.weight, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(stats.kl.double().cpu(), expected_stats.kl, rtol=1e-3, atol=1e-3)
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True)
    for actual, reference in pairs:
        assert relative_error(actual, reference) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("name", ["power", "eaft", "chord", "asft", "deft", "infosft", "psft"])
def test_no_objective_synchronizes_with_the_device(name):
    hidden, weight, _, labels = case(torch.bfloat16)
    how = {
        "positions": loss_positions(labels), "num_items": torch.tensor(50, device="cuda"),
        "objective": make_objective(name), "min_weight": torch.zeros(labels.shape, device="cuda"),
        "loss_weight": torch.ones(labels.shape, device="cuda"),
        "base": BaseHead(hidden.detach(), weight.detach()) if name == "asft" else None,
        "base_logp": torch.full(labels.shape, -3.0, device="cuda"),
    }  # fmt: skip
    linear_dft_loss(hidden, weight, labels, **how)[0].backward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_dft_loss(hidden, weight, labels, **how)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
