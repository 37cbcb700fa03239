"""The definition of the loss against formulas computed token by token in float64."""

import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dft import dft_loss
from dft.loss.objectives import make_objective

VOCAB = 11


def random_batch(seed: int = 0, batch: int = 3, seq: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, seq, VOCAB, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) < 0.4] = -100
    return logits, labels


def by_hand(
    logits: torch.Tensor, labels: torch.Tensor, alpha: float, num_items: float | None
) -> dict[str, float]:
    """Compute the loss token by token with Python floats, independently of the implementation."""
    total, nlls, hits = 0.0, [], 0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for position in range(1, len(targets)):
            target = targets[position]
            if target == -100:
                continue
            scores = row[position - 1]
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            nll = log_sum - scores[target]
            total += (alpha * math.exp(-nll) + 1 - alpha) * nll
            nlls.append(nll)
            hits += scores.index(top) == target
    return {"loss": total / (num_items or len(nlls)), "nll": sum(nlls), "tokens": len(nlls), "hits": hits}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("num_items", [None, 40])
def test_loss_and_statistics_match_the_formula(alpha, num_items):
    logits, labels = random_batch()
    expected = by_hand(logits, labels, alpha, num_items)
    loss, stats = dft_loss(logits, labels, alpha=alpha, num_items=num_items)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    assert stats.nll.sum().item() == pytest.approx(expected["nll"], rel=1e-12)
    assert len(stats.nll) == expected["tokens"] > 0
    assert stats.correct.sum().item() == expected["hits"] > 0
    torch.testing.assert_close(stats.p_correct, torch.exp(-stats.nll))
    torch.testing.assert_close(stats.weight, alpha * stats.p_correct + 1 - alpha)


def test_float32_is_close_to_float64():
    logits, labels = random_batch(batch=8, seq=64)
    exact, _ = dft_loss(logits, labels)
    rounded, _ = dft_loss(logits.float(), labels)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-6)


def test_bfloat16_logits_are_computed_in_float32():
    logits, labels = random_batch(batch=8, seq=64)
    halves = logits.bfloat16()
    loss, stats = dft_loss(halves, labels, alpha=0.7)
    expected = by_hand(halves.double(), labels, 0.7, None)
    assert stats.nll.dtype == torch.float32
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)


def test_alpha_zero_matches_the_cross_entropy_of_transformers():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, 50, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    own = model(input_ids=ids, labels=labels)
    ours, _ = dft_loss(own.logits, labels, alpha=0.0)
    assert ours.item() == pytest.approx(own.loss.item(), rel=1e-6)
    grads = [
        torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0] for loss in (own.loss, ours)
    ]
    torch.testing.assert_close(grads[0], grads[1])


def test_alpha_one_has_the_gradient_of_minus_mean_p():
    logits, labels = random_batch()
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(dft_loss(logits, labels)[0], logits)
    p = logits.softmax(-1)[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    mean_p = p[labels[:, 1:] != -100].mean()
    (expected,) = torch.autograd.grad(-mean_p, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradient_passes_gradcheck_against_the_potential(alpha):
    """Finite differences would include the detached weight, so they are taken of the potential instead."""
    logits, labels = random_batch(batch=2, seq=4)

    def potential(scores: torch.Tensor) -> torch.Tensor:
        keep = labels[:, 1:] != -100
        logp = scores.log_softmax(-1)[:, :-1][keep].gather(-1, labels[:, 1:][keep][:, None])
        return (alpha * (1 - logp.exp()) - (1 - alpha) * logp).mean()

    class WithDftGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores):
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                (ctx.grad,) = torch.autograd.grad(dft_loss(leaf, labels, alpha=alpha)[0], leaf)
            return potential(scores.detach())

        @staticmethod
        def backward(ctx, incoming):
            return incoming * ctx.grad

    assert torch.autograd.gradcheck(WithDftGradient.apply, (logits.requires_grad_(),))


def test_no_gradient_flows_through_the_weight():
    logits, labels = random_batch()
    logits.requires_grad_()
    loss, stats = dft_loss(logits, labels)
    assert not any(statistic.requires_grad for statistic in stats[:-1])
    (grad,) = torch.autograd.grad(loss, logits)
    keep = labels[:, 1:] != -100
    rows, targets = logits.detach()[:, :-1][keep], labels[:, 1:][keep]
    onehot = torch.nn.functional.one_hot(targets, VOCAB)
    expected = stats.weight[:, None] * (rows.softmax(-1) - onehot) / len(targets)
    torch.testing.assert_close(grad[:, :-1][keep], expected)
    assert grad[:, :-1][~keep].abs().sum() == 0 and grad[:, -1].abs().sum() == 0


def test_a_batch_without_supervised_tokens_has_a_zero_loss_attached_to_the_graph():
    logits, labels = random_batch()
    logits.requires_grad_()
    loss, stats = dft_loss(logits, torch.full_like(labels, -100))
    assert loss.item() == 0 and loss.requires_grad and len(stats.nll) == 0
    loss.backward()
    assert logits.grad.abs().sum() == 0


def test_rows_of_one_token_have_a_zero_loss():
    logits = torch.randn(2, 1, VOCAB, requires_grad=True)
    loss, stats = dft_loss(logits, torch.zeros(2, 1, dtype=torch.int64))
    assert loss.item() == 0 and loss.requires_grad and len(stats.nll) == 0


def test_the_first_token_is_never_a_target():
    logits, labels = random_batch()
    loss, _ = dft_loss(logits, labels)
    labels[:, 0] = 5
    assert dft_loss(logits, labels)[0].item() == loss.item()


@pytest.mark.parametrize("num_items", [60, torch.tensor(60)])
def test_losses_of_micro_batches_sum_to_the_loss_of_the_step(num_items):
    logits, labels = random_batch(batch=6)
    whole, _ = dft_loss(logits, labels, num_items=60)
    parts = [dft_loss(logits[i : i + 2], labels[i : i + 2], num_items=num_items)[0] for i in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_extreme_logits_stay_finite():
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, 0, 4], logits[0, 1, 4] = 1e4, -1e4
    logits.requires_grad_()
    loss, stats = dft_loss(logits, torch.tensor([[0, 4, 4]]))
    loss.backward()
    assert stats.p_correct.tolist() == [1.0, 0.0]
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_kl_is_finite_at_zero_probabilities_and_sends_no_gradient_to_the_base_model():
    logits = torch.tensor([[[0.0, -2000.0, 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    base = torch.tensor([[[0.0, -math.inf, 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    loss, stats = dft_loss(logits, torch.tensor([[0, 2]]), objective=make_objective("asft"), base_logits=base)
    loss.backward()
    assert base.grad is None and stats.kl.item() == 0 and logits.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_alpha_out_of_range_raises(alpha):
    with pytest.raises(ValueError, match="alpha must lie in"):
        dft_loss(*random_batch(), alpha=alpha)


def test_mismatched_shapes_raise():
    logits, labels = random_batch()
    with pytest.raises(ValueError, match=r"\(3, 7, 11\) and \(3, 6\)"):
        dft_loss(logits, labels[:, 1:])
