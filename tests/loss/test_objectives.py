"""Every objective against its formula in float64: from logits, with the fused head, with the GPU kernels."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dft import Objective, dft_loss, linear_dft_loss, make_objective
from dft.loss import rows, tiles
from dft.loss.head import inspect_head, run_base_model
from dft.loss.objectives import OBJECTIVES, Dft, Sft, TokenRows, floored_potential, resolve_objective
from dft.loss.options import BaseHead, LossOptions
from dft.loss.rows import NO_WEIGHTS, LogitTransform, RowOptions, RowWeights, score_rows_torch
from dft.loss.schedule import AlphaSchedule, alpha_of, check_schedule, scheduled

WIDTH, VOCAB = 16, 61
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


@dataclass(frozen=True)
class Case:
    """An objective with the formulas of its weight and potential for one token.

    Attributes:
        weight: function of (distribution, p), and of the base model's p if the objective uses it, for the
            token's distribution and probability.
        potential: function of p; None if the weight is not a function of p.
    """

    objective: Objective
    weight: object
    potential: object = None


def top_entropy(distribution: Tensor) -> float:
    top = sorted(distribution.tolist(), reverse=True)[:20]
    top = [p / sum(top) for p in top]
    return -sum(p * math.log(p) for p in top) / math.log(20)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def infosft_potential(p: float, p_max: float, points: int = 100_000) -> float:
    """Return the integral of w over nll, which is that of w / p over p, by the midpoint rule."""
    step = max(0.0, p_max - p) / points
    middles = p + step * (torch.arange(points, dtype=torch.float64) + 0.5)
    return step * (1 - torch.logit(middles) / logit(p_max)).sum().item()


def make_case(name: str, weight, potential=None, **parameters) -> Case:
    return Case(make_objective(name, parameters), weight, potential)


CASES = [
    make_case("dft", lambda q, p: p, lambda p: 1 - p),
    make_case("dft", lambda q, p: 0.3 * p + 0.7, lambda p: 0.3 * (1 - p) - 0.7 * math.log(p), alpha=0.3),
    make_case("sft", lambda q, p: 1, lambda p: -math.log(p)),
    make_case("power", lambda q, p: p**0.5, lambda p: (1 - p**0.5) / 0.5),
    make_case("power", lambda q, p: p**3, lambda p: (1 - p**3) / 3, k=3.0),
    make_case("threshold", lambda q, p: float(p >= 0.1), lambda p: -math.log(max(p, 0.1))),
    make_case("threshold", lambda q, p: 1, lambda p: -math.log(p), q=0.0),
    make_case("eaft", lambda q, p: top_entropy(q)),
    make_case("asft", lambda q, p: p, lambda p: 1 - p),
    make_case(
        "asft", lambda q, p: 0.5 * (p + 1), lambda p: (1 - p - math.log(p)) / 2, alpha=0.5, kl_weight=2.0
    ),
    make_case("chord", lambda q, p: p * (1 - p), lambda p: (1 - p) ** 2 / 2),
    make_case(
        "infosft", lambda q, p: p * max(0, 1 - logit(p) / logit(0.93)), lambda p: infosft_potential(p, 0.93)
    ),
    make_case(
        "infosft", lambda q, p: p * max(0, 1 - logit(p) / logit(0.6)), lambda p: infosft_potential(p, 0.6),
        p_max=0.6,
    ),
    make_case("luffy", lambda q, p: 0.1 * p / (p + 0.1) ** 2, lambda p: 1 / 1.1 - p / (p + 0.1)),
    make_case(
        "talr", lambda q, p: max(p, 0.01), lambda p: 1 - max(p, 0.01) + 0.01 * max(math.log(0.01 / p), 0)
    ),
    make_case("talr", lambda q, p: p**0.5, lambda p: 2 * (1 - p**0.5), tau=2.0, floor=0.0),
    make_case("deft", lambda q, p: p ** (q * q).sum().item()),
    make_case("iw_sft", lambda q, p, b: min(max(p / b, 0.2), 1.8)),
    make_case("psft", lambda q, p, b: p / b if p / b <= 1.28 else 0),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.objective.title)


def test_every_objective_has_a_case():
    assert {case.objective.name for case in CASES} == set(OBJECTIVES)


def batch(dtype=torch.float64, seed=0):
    """Return (hidden, weight, bias), the same of a base model, labels, lower bounds and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 9, WIDTH, generator=generator)
    weight = 0.7 * torch.randn(VOCAB, WIDTH, generator=generator)
    bias = torch.randn(VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (3, 9), generator=generator)
    labels[:, 1::3] = (hidden @ weight.t() + bias).argmax(-1)[:, :-1:3]
    labels[torch.rand(3, 9, generator=generator) < 0.3] = -100
    base = BaseHead(
        torch.randn(3, 9, 8, generator=generator).to(dtype),
        torch.randn(VOCAB, 8, generator=generator).to(dtype),
        torch.randn(VOCAB, generator=generator).to(dtype),
    )
    floors = 0.4 * (labels % 5 == 0).float()
    trained = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return trained, base, labels, floors, torch.tensor([1.0, 0.3, 2.5])[labels % 3]


def base_scores(case: Case, logits: Tensor, labels: Tensor) -> Tensor | None:
    """Return log-probabilities of the labels under a base model, on both sides of every bound of the ratio.

    Args:
        logits: (batch, seq, vocab) of the trained model.
    """
    if not case.objective.needs_base_logp:
        return None
    targets = labels[:, 1:, None].clamp(min=0)
    logp = torch.log_softmax(logits.detach().double(), -1)[:, :-1].gather(2, targets).squeeze(2)
    change = torch.tensor([0.0, 0.5, -0.15, -1.0, 2.0], dtype=torch.float64)[targets.squeeze(2) % 5]
    return torch.nn.functional.pad((logp + change).clamp(max=0), (1, 0))


def by_formula(
    case: Case, logits: Tensor, base: Tensor, base_logp: Tensor | None, labels: Tensor, floors: Tensor | None,
    factors: Tensor | None, total: float,
):  # fmt: skip
    """Compute (loss, gradient on the logits) token by token from the formulas.

    The gradient is w (softmax - onehot), plus that of the KL divergence by autograd.
    """
    logits = logits.detach().requires_grad_()
    gradient, loss = torch.zeros_like(logits), 0.0
    for row, column in zip(*torch.nonzero(labels[:, 1:] != -100, as_tuple=True), strict=True):
        target = labels[row, column + 1]
        distribution = torch.softmax(logits[row, column], -1)
        p = distribution[target].item()
        scores = [] if base_logp is None else [base_logp[row, column + 1].exp().item()]
        weight = case.weight(distribution, p, *scores)
        if floors is not None:
            weight = max(weight, floors[row, column + 1].item())
        factor = 1.0 if factors is None else factors[row, column + 1].item()
        weight *= factor
        loss -= weight * math.log(p)
        gradient[row, column] += weight * distribution.detach()
        gradient[row, column, target] -= weight
        if case.objective.kl_weight:
            other = torch.softmax(base[row, column], -1)
            kl = (distribution * (distribution.log() - other.log())).sum()
            loss += factor * case.objective.kl_weight * kl.item()
            gradient += factor * case.objective.kl_weight * torch.autograd.grad(kl, logits)[0]
    return loss / total, gradient / total


@every_case
@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_match_the_formulas(case, floored, weighted):
    (hidden, weight, bias), base, labels, floors, factors = batch()
    logits = (hidden @ weight.t() + bias).detach().requires_grad_()
    base_logits = base.hidden @ base.weight.t() + base.bias
    scores = base_scores(case, logits, labels)
    floors, factors = floors if floored else None, factors if weighted else None
    loss, stats = dft_loss(
        logits, labels, objective=case.objective, num_items=40, min_weight=floors, loss_weight=factors,
        base_logits=base_logits if case.objective.kl_weight else None, base_logp=scores,
    )  # fmt: skip
    loss.backward()
    expected, gradient = by_formula(case, logits, base_logits, scores, labels, floors, factors, 40)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-9, atol=1e-12)
    assert (stats.kl.sum() > 0) == (case.objective.kl_weight > 0)


@every_case
@pytest.mark.parametrize("dtype, close", PRECISIONS)
@pytest.mark.parametrize("shape", [(1.0, None), (2.0, 5.0)])
def test_the_fused_head_matches_the_logits(monkeypatch, case, dtype, close, shape):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * 4)  # several tiles
    monkeypatch.setattr(rows, "CACHED_BYTES", 4 * VOCAB * 3)
    trained, base, labels, floors, factors = batch(dtype)
    anchored = case.objective.kl_weight > 0

    def shaped(hidden, weight, bias):
        logits = shape[0] * (hidden @ weight.t() + bias)
        return logits if shape[1] is None else shape[1] * torch.tanh(logits / shape[1])

    exact = [tensor.detach().double().requires_grad_() for tensor in trained]
    how = {
        "objective": case.objective,
        "min_weight": floors,
        "loss_weight": factors,
        "num_items": 40.0,
        "base_logp": base_scores(case, shaped(*exact), labels),
    }
    loss, stats = linear_dft_loss(
        trained[0], trained[1], labels, bias=trained[2], logit_scale=shape[0], logit_softcap=shape[1],
        base=base if anchored else None, **how,
    )  # fmt: skip
    loss.backward()
    base_logits = shaped(*(tensor.double() for tensor in base)) if anchored else None
    expected, expected_stats = dft_loss(shaped(*exact), labels, base_logits=base_logits, **how)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    for value, reference in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(value.double(), reference.double(), rtol=close, atol=close)
    for tensor, reference in zip(trained, exact, strict=True):
        assert (tensor.grad.double() - reference.grad).norm() < close * reference.grad.norm()


KERNEL_SETTINGS = [
    *(((1.0, None), floored, weighted) for floored in (False, True) for weighted in (False, True)),
    *((shape, both, both) for shape in ((-0.5, None), (2.0, 5.0)) for both in (False, True)),
]
"""Shapes of the logits, and whether there are lower bounds and data weights, which torch applies."""


@every_case
@pytest.mark.parametrize(("shape", "floored", "weighted"), KERNEL_SETTINGS)
def test_the_kernel_matches_plain_torch(monkeypatch, case, shape, floored, weighted):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("test_cuda.py runs the kernel itself")
    from dft.loss import kernels  # tests/conftest.py sets TRITON_INTERPRET

    monkeypatch.setattr(kernels, "BLOCK", 32)
    generator = torch.Generator().manual_seed(1)
    tile = 3 * torch.randn(7, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (7,), generator=generator)
    floors = 0.4 * (targets % 2 == 0).float() if floored else None
    logits = LogitTransform(*shape)(tile.double())
    scores = base_scores(case, logits[:, None].expand(-1, 2, -1), targets[:, None].expand(-1, 2))
    scores = None if scores is None else scores[:, 1]
    weights = RowWeights(floors, 0.5 + targets % 3 if weighted else None, scores)
    row_scale, options = torch.tensor(0.37), RowOptions(case.objective, *shape)
    base = 3 * torch.randn(7, VOCAB, generator=generator) + 9 if case.objective.kl_weight else None
    expected, gradient = score_rows_torch(
        tile.double(), targets, row_scale.double(), options, weights, None if base is None else base.double()
    )
    for out in (None, torch.empty(7, VOCAB)):
        stats, actual = kernels.score_rows(tile.clone(), targets, row_scale, options, out, weights, base)
        torch.testing.assert_close(actual.double(), gradient, rtol=1e-5, atol=2e-6)
        for value, reference in zip(stats[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(value.double(), reference.double(), rtol=1e-5, atol=2e-5)
    alone, none = kernels.score_rows(tile.clone(), targets, None, options, None, weights, base)
    assert none is None and torch.equal(alone.weight, stats.weight)


@every_case
@pytest.mark.parametrize("fused", [False, True])
def test_data_weights_multiply_what_a_token_adds_to_the_loss(case, fused):
    """Tokens of weight 0 equal unsupervised ones at the same N, and half the weight is half the gradient."""
    (hidden, weight, bias), base, labels, _, _ = batch()
    base = base if case.objective.kl_weight else None

    def gradients(labels, factors):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight, bias)]
        how = {
            "objective": case.objective,
            "num_items": 40,
            "loss_weight": factors,
            "base_logp": base_scores(case, inputs[0] @ inputs[1].t() + inputs[2], labels),
        }
        if fused:
            loss, _ = linear_dft_loss(inputs[0], inputs[1], labels, bias=inputs[2], base=base, **how)
        else:
            base_logits = None if base is None else base.hidden @ base.weight.t() + base.bias
            logits = inputs[0] @ inputs[1].t() + inputs[2]
            loss, _ = dft_loss(logits, labels, base_logits=base_logits, **how)
        loss.backward()
        return [loss.detach(), *(tensor.grad for tensor in inputs)]

    chosen = labels % 2 == 0
    of_chosen, of_others = labels.masked_fill(~chosen, -100), labels.masked_fill(chosen, -100)
    without = gradients(labels, chosen.double())
    for value, expected in zip(without, gradients(of_chosen, None), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    mixed = gradients(labels, 0.5 + 0.5 * chosen.double())
    rest = gradients(of_others, None)
    for value, full, half in zip(mixed, without, rest, strict=True):
        torch.testing.assert_close(value, full + 0.5 * half, rtol=1e-12, atol=1e-14)


def infosft_as_published(logp: Tensor, probs: Tensor, base_logp: Tensor) -> Tensor:
    """Training code of arXiv 2605.14967, with its P of 0.93."""
    ratio = (logp - (1 - logp.exp()).log()) / math.log(0.93 / 0.07)
    return -(logp.exp() * torch.relu(1 - ratio)).detach() * logp


def deft_as_published(logp: Tensor, probs: Tensor, base_logp: Tensor) -> Tensor:
    """The deformed logarithm of arXiv 2602.11424 with the collision probability as its exponent."""
    alpha = probs.square().sum(-1).detach()
    return (1 - torch.exp(alpha * logp)) / alpha


def psft_as_published(logp: Tensor, probs: Tensor, base_logp: Tensor) -> Tensor:
    """The clipped surrogate of arXiv 2508.17784, an advantage of 1, and the bounds of its training script."""
    ratio = torch.exp(logp - base_logp)
    return -torch.minimum(ratio, ratio.clamp(1 - 0.2, 1 + 0.28))


PUBLISHED = {
    "dft": lambda logp, probs, base_logp: -logp.exp().detach() * logp,
    "sft": lambda logp, probs, base_logp: -logp,
    "power": lambda logp, probs, base_logp: (1 - logp.exp() ** 0.5) / 0.5,
    "threshold": lambda logp, probs, base_logp: -logp * (logp.exp() >= 0.1),
    "talr": lambda logp, probs, base_logp: -logp.exp().detach().clamp(min=0.01) * logp,
    "infosft": infosft_as_published,
    "luffy": lambda logp, probs, base_logp: -logp.exp() / (logp.exp() + 0.1),
    "deft": deft_as_published,
    "iw_sft": lambda logp, probs, base_logp: -torch.exp(logp - base_logp).clamp(0.2, 1.8).detach() * logp,
    "psft": psft_as_published,
}
"""Losses per token as their papers or the code of their authors write them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradients_are_those_of_the_published_loss(name):
    """By autograd through all logits; deterministic inputs in float64."""
    case = next(case for case in CASES if case.objective.name == name)
    (hidden, weight, bias), _, labels, _, _ = batch()
    scores = base_scores(case, hidden @ weight.t() + bias, labels)
    loss, _ = linear_dft_loss(
        hidden, weight, labels, bias=bias, objective=case.objective, num_items=40, base_logp=scores
    )
    actual = torch.autograd.grad(loss, (hidden, weight, bias))
    keep = labels[:, 1:] != -100
    log_probs = torch.log_softmax((hidden @ weight.t() + bias)[:, :-1][keep], -1)
    logp = log_probs.gather(1, labels[:, 1:][keep][:, None]).squeeze(1)
    published = PUBLISHED[name](logp, log_probs.exp(), None if scores is None else scores[:, 1:][keep])
    expected = torch.autograd.grad(published.sum() / 40, (hidden, weight, bias))
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("largest", [1.0, 50.0, 1e5])
def test_large_data_weights_do_not_overflow_float16(largest):
    (hidden, weight, _), _, labels, _, factors = batch(torch.float16)
    loss, _ = linear_dft_loss(hidden, weight, labels, num_items=40, loss_weight=largest * factors)
    loss.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    linear_dft_loss(*exact, labels, num_items=40, loss_weight=factors)[0].backward()
    if largest * exact[1].grad.abs().max() < torch.finfo(torch.float16).max:  # the gradient itself fits
        error = (weight.grad.double() / largest - exact[1].grad).norm()
        assert error < 5e-3 * exact[1].grad.norm()
        assert hidden.grad.isfinite().all()


@every_case
def test_the_weight_is_the_derivative_of_the_potential(case):
    """The derivative is with respect to nll; the potential is 0 at p = 1."""
    nll = torch.linspace(0.01, 6, 57, dtype=torch.float64).requires_grad_()
    potential = case.objective.potential(nll)
    if case.potential is None:
        assert potential is None
        return
    expected = [case.potential(math.exp(-value)) for value in nll.tolist()]
    torch.testing.assert_close(potential, torch.tensor(expected, dtype=torch.float64))
    (slope,) = torch.autograd.grad(potential.sum(), nll)
    weights = [case.weight(None, math.exp(-value)) for value in nll.tolist()]
    torch.testing.assert_close(slope, torch.tensor(weights, dtype=torch.float64))
    assert case.objective.potential(torch.zeros(1)).item() == 0
    floored = floored_potential(case.objective, nll.detach(), 0.0)
    assert (floored - potential).abs().max() < 3e-3  # a floor of 0 has no effect


@pytest.mark.parametrize("floor", [0.1, 0.6, 1.0])
def test_the_floored_potential_matches_its_formula(floor):
    """For DFT it is 1 - p while p is above the floor, then linear in nll with the floor as its slope."""
    nll = torch.tensor([0.0, 0.05, 0.4, 2.5, 9.0, 31.9, 45.0, math.nan], dtype=torch.float64)
    potential = floored_potential(make_objective("dft"), nll, floor)
    start = -math.log(floor)
    for value, actual in zip(nll.tolist()[:-1], potential.tolist(), strict=False):
        expected = 1 - math.exp(-value) if value < start else (1 - floor) + floor * (value - start)
        assert actual == pytest.approx(expected, abs=1e-4)
    assert potential[-1].isnan()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, {}) for name in OBJECTIVES), ("infosft", {"p_max": 0.55}), ("iw_sft", {"clip": 1}),
        ("psft", {"clip": 1}), ("talr", {"floor": 1}), ("luffy", {"gamma": 0.0001}), ("dft", {"alpha": 0.4}),
    ],
)  # fmt: skip
def test_weights_lie_between_zero_and_two(name, parameters):
    """At any p, including 0 and 1, and any p of the base model; gradients of float16 rows rely on it."""
    objective = make_objective(name, parameters)
    nll = torch.tensor([0.0, 1e-9, math.inf, *torch.logspace(-6, 5, 500).tolist()])
    for base_logp in (0.0, -0.1, -2.0, -1e4):
        rows = TokenRows(
            nll, torch.exp(-nll), torch.ones_like(nll), -torch.rand(len(nll), 20),
            base_logp=torch.full_like(nll, base_logp), collision=torch.linspace(1e-5, 1, len(nll)),
        )  # fmt: skip
        weights = objective.weight(rows)
        assert weights.shape == nll.shape and weights.min() >= 0 and weights.max() <= 2
        assert weights.min() >= objective.least_weight - 1e-6


@pytest.mark.parametrize("value", ["0.5", None, [1], torch.tensor(0.5)], ids=repr)
def test_a_parameter_that_is_not_a_number_is_rejected(value):
    with pytest.raises(ValueError, match=re.escape(f"k must be a number in [0.001, 100], got {value!r}")):
        make_objective("power", {"k": value})
    with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\]"):
        Dft(value)


@pytest.mark.parametrize("objective", ["power", Sft], ids=["name", "class"])
def test_only_an_instance_is_an_objective(objective):
    with pytest.raises(ValueError, match="must be an instance of Objective, such as make_objective"):
        resolve_objective(None, objective, False)


def test_unknown_objectives_and_parameters_raise():
    with pytest.raises(ValueError, match="unknown objective 'dtf'; choose from dft, sft, power"):
        make_objective("dtf")
    with pytest.raises(ValueError, match="the objective power has no parameter 'q'; its parameters are k"):
        make_objective("power", {"q": 1})
    with pytest.raises(ValueError, match="the objective sft has no parameter 'k'; it has no parameters"):
        make_objective("sft", {"k": 1})
    for name, parameters in {"power": {"k": 0}, "threshold": {"q": 1.1}, "asft": {"kl_weight": -1}}.items():
        with pytest.raises(ValueError, match="must lie in"):
            make_objective(name, parameters)
    assert make_objective("power", {"k": 2}).title == "POWER (k 2)"
    assert make_objective("dft", {"alpha": 0}).title == "SFT"


def test_incompatible_arguments_raise():
    (hidden, weight, _), base, labels, floors, _ = batch()
    with pytest.raises(ValueError, match=r"alpha 0.5 and the objective Sft\(\) both set the token weight"):
        linear_dft_loss(hidden, weight, labels, alpha=0.5, objective=make_objective("sft"))
    with pytest.raises(ValueError, match="needs the logits or hidden states of a base model"):
        linear_dft_loss(hidden, weight, labels, objective=make_objective("asft"))
    for name in ("iw_sft", "psft"):
        for score in (
            lambda **how: linear_dft_loss(hidden, weight, labels, **how),
            lambda **how: dft_loss(hidden @ weight.t(), labels, **how),
        ):
            with pytest.raises(
                ValueError, match="needs base_logp, the log-probabilities of the targets under"
            ):
                score(objective=make_objective(name))
            with pytest.raises(ValueError, match=r"base_logp must be \(batch, seq\) like the labels"):
                score(objective=make_objective(name), base_logp=floors[:, 1:])
    with pytest.raises(ValueError, match="does not use a base model"):
        linear_dft_loss(hidden, weight, labels, base=base)
    wrong = base._replace(weight=base.weight[1:])
    with pytest.raises(ValueError, match="the base's hidden must be"):
        linear_dft_loss(hidden, weight, labels, objective=make_objective("asft"), base=wrong)
    for name in ("min_weight", "loss_weight"):
        wrong = {name: floors[:, 1:]}
        with pytest.raises(ValueError, match=rf"{name} must be \(batch, seq\) like the labels"):
            linear_dft_loss(hidden, weight, labels, **wrong)
        with pytest.raises(ValueError, match=rf"{name} must be \(batch, seq\) like the labels"):
            dft_loss(hidden @ weight.t(), labels, **wrong)


def test_tokens_that_both_models_exclude_do_not_change_the_kl():
    """In some models the logits of vocabulary padding are -inf."""
    logits = torch.tensor([[[1.0, 2.0, -torch.inf], [0.5, 0.1, -torch.inf]]], dtype=torch.float64)
    labels = torch.tensor([[0, 1]])
    logits.requires_grad_()
    base = logits.detach() + torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    objective = make_objective("asft", {"kl_weight": 1.0})
    loss, stats = dft_loss(logits, labels, objective=objective, base_logits=base)
    p, q = (torch.softmax(scores[0, 0, :2], -1) for scores in (logits.detach(), base))
    assert stats.kl.item() == pytest.approx((p * (p / q).log()).sum().item())
    loss.backward()
    assert logits.grad.isfinite().all()
    tile, log_base = logits.detach()[0, :1].clone(), torch.log_softmax(base, -1)[0, :1].clone()
    row_scale = torch.tensor(1.0, dtype=torch.float64)
    stats, gradient = score_rows_torch(
        tile, labels[0, 1:], row_scale, RowOptions(objective), NO_WEIGHTS, log_base
    )
    torch.testing.assert_close(gradient, logits.grad[0, :1])


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_equals_its_base_model_has_the_dft_loss(fused):
    tiny_model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )  # fmt: skip
    )
    ids = torch.arange(16).view(2, 8) + 3
    inputs = {"input_ids": ids}
    head = inspect_head(tiny_model.eval(), tiny_model, inputs, torch.float32)
    objective = make_objective("asft", {"kl_weight": 3.0})
    if fused:
        base = run_base_model(tiny_model, inputs)
        loss, stats, _ = head.score(tiny_model, inputs, ids, LossOptions(objective, base=base))
        expected, _, _ = head.score(tiny_model, inputs, ids, LossOptions())
    else:
        logits = tiny_model(**inputs).logits
        loss, stats = dft_loss(logits, ids, objective=objective, base_logits=logits.detach())
        expected, _ = dft_loss(logits, ids)
    assert stats.kl.abs().max() < 1e-6 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "forward" not in vars(tiny_model.get_output_embeddings())


def test_alpha_rises_over_the_share_of_the_schedule():
    objective = make_objective("dft", {"alpha": 0.8})
    alphas = {
        kind: [alpha_of(scheduled(objective, AlphaSchedule(kind, 0.5), step, 8)) for step in range(8)]
        for kind in ("constant", "linear", "cosine")
    }
    assert alphas["constant"] == [0.8] * 8
    assert alphas["linear"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    rise = [0.8 * (1 - math.cos(math.pi * part / 4)) / 2 for part in range(4)]
    assert alphas["cosine"] == pytest.approx([*rise, 0.8, 0.8, 0.8, 0.8])
    with pytest.raises(ValueError, match="must be one of constant, linear, cosine"):
        AlphaSchedule("exponential")
    with pytest.raises(ValueError, match="must be above 0 and at most 1, got 0"):
        AlphaSchedule("linear", 0)
    with pytest.raises(ValueError, match="has no alpha"):
        check_schedule(make_objective("chord"), AlphaSchedule("linear"), 0)
    with pytest.raises(ValueError, match=r"end_of_turn_weight must lie in \[0, 1\], got 2"):
        check_schedule(objective, AlphaSchedule(), 2)


def test_infosft_does_not_train_a_token_whose_nll_was_rounded_below_0():
    nll = torch.tensor([-1e-7, 0.0, 1e-7])
    assert make_objective("infosft").weight(TokenRows(nll, nll.neg().exp(), nll)).tolist() == [0, 0, 0]
